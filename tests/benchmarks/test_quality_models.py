"""Encoders: the stack against PEFT, one run at a time; sentences, images, and full fine-tuning."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from benchmarks.quality.bench import Bench
from benchmarks.quality.data import classification
from benchmarks.quality.data.files import load_pools
from benchmarks.quality.data.order import batch_order
from benchmarks.quality.experiment import FULL, Experiment
from benchmarks.quality.initialization import Initialiser, lora_config, start_of
from benchmarks.quality.models.registry import KINDS, defaults, model_of
from benchmarks.quality.records import read_records
from benchmarks.quality.training.encoder import StackedEncoder
from benchmarks.quality.training.full_fine_tuning import score, train_full
from benchmarks.quality.training.reference import train_plain
from benchmarks.quality.training.trainer import Job, StackTrainer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import lorainit


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=24, num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def write(folder, kind):
    """A task that can be learned: the first token's or the image's half says the class."""
    generator = np.random.default_rng(0)
    arrays = {"kind": np.array(kind)}
    for split, size in (("train", 64), ("validation", 24), ("test", 24), ("other", 24)):
        if kind == "text":
            tokens = generator.integers(1, 40, (size, 12)).astype(np.uint16)
            for row, length in zip(tokens, generator.integers(3, 13, size), strict=True):
                row[length:] = 0
            labels = tokens[:, 0] % 2
        else:
            tokens = generator.integers(0, 256, (size, 64)).astype(np.uint8)
            labels = (tokens[:, :32].mean(1) > tokens[:, 32:].mean(1)).astype(np.uint8)
        arrays |= {f"{split}_tokens": tokens, f"{split}_labels": labels}
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / f"{kind}.npz", **arrays)


CASES = [("text", bert, "all-minilm-l6-v2"), ("image", vit, "vit-mnist")]


@pytest.mark.parametrize(("kind", "make", "name"), CASES)
@pytest.mark.parametrize("anchored", [False, True])
def test_a_stack_of_encoders_trains_as_separate_runs_do(tmp_path, kind, make, name, anchored):
    write(tmp_path, kind)
    pools = load_pools(kind, tmp_path, name)
    methods = [lorainit.PiSSA(), lorainit.MiLoRA()] if anchored else [lorainit.Vanilla()] * 2
    steps, e = 8, Experiment(kind, "vanilla", 1e-2, rank=4, model=name, precision="fp32")
    trainer = StackTrainer(
        StackedEncoder(make(), fuse=False), stack=3, rank=4, anchored=anchored, scaling=e.scaling,
        train=pools["train"], batch_size=8, max_steps=steps, warmup=0.1, clip=0.5,
        evaluation_rows=16, graphs=False,
    )  # fmt: skip
    jobs, expected = [], []
    for seed, (method, rate) in enumerate(zip(methods, (1e-2, 3e-3), strict=True)):
        model = make()
        KINDS[name].seed_head(model, seed)
        torch.manual_seed(seed)
        wrapped = lorainit.get_peft_model(model, lora_config(e), method=method, progress=False)
        order = batch_order(64, 48, seed, steps, 8)
        jobs.append(Job(start_of(wrapped), rate, order))
        before = score(wrapped, pools["validation"])
        losses = train_plain(
            wrapped, pools["train"], order, learning_rate=rate, warmup=0.1, clip=0.5
        )
        expected.append((before, losses, score(wrapped, pools["validation"])))
    outcomes = trainer.run(
        jobs,
        scores={"validation": pools["validation"]},
        start_scores={"validation": pools["validation"]},
    )
    heads = [job.start.extras["classifier.weight"] for job in jobs]
    assert torch.equal(*heads) == (kind == "image")
    for outcome, (before, losses, after) in zip(outcomes, expected, strict=True):
        torch.testing.assert_close(outcome.start_scores["validation"][0], before[0])
        torch.testing.assert_close(outcome.train_loss, losses, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(outcome.scores["validation"][0], after[0], rtol=1e-3, atol=1e-3)
        assert losses[-1] != pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize(("kind", "make", "name"), CASES)
def test_a_stage_of_encoders_is_recorded(tmp_path, kind, make, name):
    write(tmp_path / "data", kind)
    small = {
        "rank": 2, "steps": 4, "batch_size": 4, "train_samples": 32, "statistics_samples": 16,
        "model": name, "precision": "fp32",
    }  # fmt: skip
    methods = ["vanilla", "pissa", "eva", "lora-da", "lora-one", FULL]
    runs = [Experiment(kind, m, 1e-3, seed, **small) for m in methods for seed in (0, 1)]
    bench = Bench(
        make(), tmp_path / "data", tmp_path, "seeds", stack=4, evaluation_rows=12, commit="none"
    )
    before = {n: p.clone() for n, p in bench.model.named_parameters() if "classifier" not in n}
    assert bench.run(runs, set()) == len(runs)
    for n, p in before.items():
        assert torch.equal(p, bench.model.get_parameter(n))
    assert not read_records([tmp_path], "failures")
    records = read_records([tmp_path])
    for run in runs:
        record = records[run.id]
        assert record["other"]["sequences"] == 24
        assert record["heldout"]["loss"][0] > 0
    base = [records[r.id]["heldout"]["loss"][0] for r in runs if r.seed == 0]
    same = [b for m, b in zip(methods, base, strict=True) if m in ("vanilla", "pissa", "eva", FULL)]
    assert same == pytest.approx([same[0]] * 4, rel=1e-4)


@pytest.mark.parametrize(("kind", "make", "name"), CASES)
def test_a_start_that_fits_the_head_leaves_the_base_its_own(tmp_path, kind, make, name):
    """Plain LoRA starts under the same head before and after it."""
    write(tmp_path, kind)
    train, model = load_pools(kind, tmp_path, name)["train"], make()
    common = {"model": name, "rank": 2, "precision": "fp32", "train_samples": 64}
    plain, fitting = (Experiment(kind, m, 1e-3, **common) for m in ("vanilla", "natural"))
    head = model.classifier

    def head_of(experiment):
        # Starts are kept: a new one for each.
        extras = Initialiser(model, batch_size=8)(experiment, train).start.extras
        return torch.cat([extras["classifier.weight"].flatten(), extras["classifier.bias"]])

    before, fitted, after = head_of(plain), head_of(fitting), head_of(plain)
    assert not torch.equal(fitted, before)
    assert torch.equal(after, before)
    assert model.classifier is head
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(("kind", "make", "name"), CASES)
def test_a_head_goes_as_far_as_it_is_told(tmp_path, kind, make, name):
    """A part of the way that a whole one goes, from where it was; not at all with false."""
    write(tmp_path, kind)
    train, model = load_pools(kind, tmp_path, name)["train"], make()
    common = {"model": name, "rank": 2, "precision": "fp32", "train_samples": 64}
    weights, counts = {}, {}
    told = {"": {}, "no": {"fitted": False}, "half": {"fitted": 0.5}}
    told |= {"whole": {"fitted": 1.0}, "as ever": {"fitted": True}}
    for key, settings in told.items():
        line = Experiment(kind, "vanilla", 1e-3, settings=settings, statistics_samples=16, **common)
        initialise = Initialiser(model, batch_size=8)
        with mock.patch.object(initialise, "batches", wraps=initialise.batches) as batches:
            weights[key] = initialise(line, train).start.extras["classifier.weight"]
        counts[key] = [call.args[2] for call in batches.mock_calls]
    assert torch.equal(weights[""], weights["no"])
    way = weights["whole"] - weights[""]
    assert way.norm() > 0
    assert torch.allclose(weights["half"], weights[""] + way / 2, atol=1e-6)
    assert torch.allclose(weights["as ever"], weights[""] + way / 4, atol=1e-6)
    # Four times what statistics would have.
    assert counts == {"": [], "no": [], "half": [4], "whole": [4], "as ever": [4]}
    batches = Initialiser(model, batch_size=8).batches(line, train, 4)
    assert sum(len(batch["labels"]) for batch in batches) == 64


def test_full_fine_tuning_is_plain_training_of_every_weight(tmp_path):
    write(tmp_path, "text")
    pools = load_pools("text", tmp_path, "all-minilm-l6-v2")
    with pytest.raises(ValueError, match="tokens of all-minilm-l6-v2"):
        load_pools("text", tmp_path, "gemma-3-270m")
    order = batch_order(64, 32, 0, 6, 8)
    outcome = train_full(
        bert(), pools["train"], order, learning_rate=1e-2, warmup=0.1, clip=1.0, bfloat16=False,
        curve=pools["validation"], curve_at=[0, 6], scores={"test": pools["test"]},
    )  # fmt: skip
    model = bert()
    losses = train_plain(model, pools["train"], order, learning_rate=1e-2, warmup=0.1)
    torch.testing.assert_close(outcome.train_loss, losses)
    torch.testing.assert_close(outcome.scores["test"][0], score(model, pools["test"])[0])


def test_tasks_say_their_model():
    assert model_of(["movies", "tweets"]) == "all-minilm-l6-v2"
    assert model_of(["chain_sum"]) == "smollm2-135m-instruct"
    with pytest.raises(ValueError, match="one call trains one model"):
        model_of(["movies", "digits"])
    assert defaults("digits")["model"] == "vit-mnist"


def test_the_shifts_are_what_they_say(monkeypatch):
    """On stand-ins for the packages' data: halves are disjoint, turning and inverting are exact."""
    images = np.random.default_rng(1).integers(0, 256, (5000, 28, 28)).astype(np.uint8)
    monkeypatch.setattr(classification.sources, "mnist", lambda: (images, np.arange(5000) % 10))
    first, second = classification.mnist_half(0)[0], classification.mnist_half(1)[0]
    assert not {x.tobytes() for x in first} & {x.tobytes() for x in second}
    rotated, inverted = classification._shift("rotated"), classification._shift("inverted")
    for split in ("train", "validation", "test"):
        turned = np.rot90(rotated[split][0].reshape(-1, 28, 28), -1, axes=(1, 2))
        assert np.array_equal(turned.reshape(len(turned), -1), 255 - inverted[split][0])
    assert np.array_equal(
        255 - inverted["test"][0][: classification.OTHER_ROWS], inverted["other"][0]
    )
