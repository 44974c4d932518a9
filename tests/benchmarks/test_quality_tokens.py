"""Prepared tasks belong to one model's tokens: they say so, and no other model reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from benchmarks.quality.bench import Bench
from benchmarks.quality.data import reasoning
from benchmarks.quality.data.files import load_pools, model_of_data, prepare, style_of
from benchmarks.quality.data.reasoning import WORDS, Words
from benchmarks.quality.experiment import Experiment

from tests.benchmarks.test_quality_gemma import base_model
from tests.benchmarks.tokenizer import ByteTokenizer

SMALL, LARGE = "smollm2-135m-instruct", "gemma-3-270m"


@dataclass(frozen=True)
class WideTokenizer(ByteTokenizer):
    """Tokens that 16 bits do not hold, and a first one."""

    bos_token_id: int = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        del add_special_tokens
        return {"input_ids": [200_000 + byte for byte in text.encode()]}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(reasoning, "SIZES", {"train": 24, "validation": 8, "test": 8})
    monkeypatch.setitem(WORDS, SMALL, Words(ByteTokenizer, ("plain", "chat"), begin=False))
    monkeypatch.setitem(WORDS, LARGE, Words(WideTokenizer, ("plain",), begin=True))


def test_tokens_are_the_models_own(tmp_path):
    for model in (SMALL, LARGE):
        path = prepare("gcd", tmp_path / model, model=model)
        assert prepare("gcd", tmp_path / model, model=model) == path
        assert model_of_data("gcd", tmp_path / model) == model
    small = load_pools("gcd", tmp_path / SMALL, SMALL)["train"]
    large = load_pools("gcd", tmp_path / LARGE, LARGE)["train"]
    assert len(small) == len(large) == 24
    for row in range(24):
        theirs = small.tokens[row, : small.lengths[row]].tolist()
        ours = large.tokens[row, : large.lengths[row]].tolist()
        assert ours[0] == 2
        assert ours[-1] == theirs[-1] == 1
        assert [t - 200_000 for t in ours[1:-1]] == [t - 2 for t in theirs[:-1]]
        # What is learned is the same text; it stands one place later.
        used = int(small.weights[row].sum())
        assert used == int(large.weights[row].sum())
        assert (large.positions[row, :used] == small.positions[row, :used] + 1).all()
    with np.load(tmp_path / SMALL / "gcd.npz") as file:
        assert file["train_tokens"].dtype == np.uint16


def test_a_model_reads_its_own_tokens_alone(tmp_path):
    prepare("gcd", tmp_path / "small", model=SMALL)
    prepare("gcd", tmp_path / "large", model=LARGE)
    load_pools("gcd", tmp_path / "large", f"{LARGE}+nf4")
    for folder, model in (("small", LARGE), ("large", SMALL), ("small", f"{LARGE}+nf4")):
        with pytest.raises(ValueError, match=rf"--model {model.partition('+')[0]}"):
            load_pools("gcd", tmp_path / folder, model)
    bench = Bench(base_model(), tmp_path / "small", tmp_path / "out", "grid", commit="none")
    with pytest.raises(ValueError, match=f"tokens of {SMALL}, not of {LARGE}"):
        bench.run([Experiment("gcd", "vanilla", 1e-3, model=LARGE)], set())
    assert not (tmp_path / "out").exists()


def test_files_without_a_name_are_the_first_models(tmp_path):
    path = prepare("gcd", tmp_path, model=SMALL)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file if name != "model"}
    np.savez_compressed(path, **arrays)
    load_pools("gcd", tmp_path, SMALL)
    with pytest.raises(ValueError, match=f"tokens of {SMALL}"):
        load_pools("gcd", tmp_path, LARGE)


def test_one_folder_holds_one_models_tokens(tmp_path):
    prepare("gcd", tmp_path, model=SMALL)
    with pytest.raises(ValueError, match="is there already"):
        prepare("gcd", tmp_path, model=LARGE)
    with pytest.raises(ValueError, match="is there already"):
        prepare("gcd", tmp_path, "chat", model=SMALL)
    prepare("letter_counting", tmp_path, model=LARGE)
    with pytest.raises(ValueError, match="a folder of its own"):
        load_pools("gcd", tmp_path, SMALL)


def test_another_task_that_does_not_fit_is_left_out(tmp_path):
    """As letter_counting's answers beside those of isomorphic_strings: an empty pool could not be measured."""
    prepare("gcd", tmp_path, model=SMALL)
    path = prepare("letter_counting", tmp_path, model=SMALL)
    assert len(load_pools("gcd", tmp_path, SMALL)["other"]) > 0
    with np.load(path) as file:
        arrays = dict(file)
    arrays["validation_prompts"] = np.zeros_like(arrays["validation_prompts"])
    np.savez_compressed(path, **arrays)
    assert "other" not in load_pools("gcd", tmp_path, SMALL)


def test_a_base_model_is_given_no_chat(tmp_path):
    with pytest.raises(ValueError, match="are plain, not chat"):
        prepare("gcd", tmp_path, "chat", model=LARGE)
    prepare("gcd", tmp_path, "chat", model=SMALL)
    assert style_of("gcd", tmp_path) == "chat"
