"""The demo's whole line on a tiny model: the same code as on the real one, in seconds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("reasoning_gym")
pytest.importorskip("accelerate")

from benchmarks.demo import four_bits, report, run
from benchmarks.demo.settings import Settings, entries, result_key
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks.tokenizer import ByteTokenizer

SETTINGS = Settings(
    max_length=160,
    statistics_sequences=6,
    statistics_batch=3,
    rate_sequences=6,
    rank=2,
    steps=3,
    batch_size=2,
    held_out=8,
    score_steps=(1,),
)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A random Llama in place of the real model, byte tokens in place of its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(ByteTokenizer()),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    monkeypatch.setattr(run, "load_smollm2", lambda: LlamaForCausalLM.from_pretrained(folder))
    monkeypatch.setattr(run, "load_smollm2_tokenizer", ByteTokenizer)
    monkeypatch.setattr(run, "smollm2_folder", lambda: folder)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "filet",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("lora", "lora-suggested", "lora-da")
        ),
    ],
)
def test_the_whole_line(name, tiny, tmp_path):
    data = run.load_data(SETTINGS)
    result = run.run_method(SETTINGS, entries()[name], data, tmp_path)
    assert [point["step"] for point in result["held_out"]] == [0, 1, 3]
    assert len(result["train_loss"]) == 3
    base = run.run_base(SETTINGS, data)
    start = result["held_out"][0]["loss"] - base["held_out"][0]["loss"]
    assert (start == 0) == (name != "lora-da")  # an anchored or zero start is the base's own
    assert result["held_out"][-1]["loss"] != result["held_out"][0]["loss"]
    if name.startswith("lora-s") or name == "lora":
        assert result["reload"] is None
    else:
        assert result["reload"]["max_abs_diff"] < 1e-5
        assert result["reload"]["rank"] == (4 if name == "filet" else 2)
        assert not result["reload"]["lorainit_imported"]
    assert (result["learning_rate"] == 2e-4) == (name == "lora")
    assert ("suggested" in result["label"]) == (name != "lora")
    json.dumps(result)


def test_a_changed_base_weight_is_noticed(tiny):
    from peft import LoraConfig

    import lorainit

    model = lorainit.get_peft_model(
        run.load_smollm2(), LoraConfig(target_modules="all-linear"), method=lorainit.Vanilla()
    )
    run._check_base_unchanged(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "base_layer" in n).view(-1)[0] += 1e-6
    with pytest.raises(RuntimeError, match="base weights changed"):
        run._check_base_unchanged(model)


def test_another_setting_or_method_is_another_result():
    known = entries()
    keys = {result_key(SETTINGS, entry) for entry in [None, *known.values()]}
    keys.add(result_key(replace(SETTINGS, seed=1), None))
    assert len(keys) == len(known) + 2
    assert result_key(SETTINGS, known["lora"]) == result_key(SETTINGS, known["lora"])


def _result(name: str) -> dict:
    points = [{"step": s, "loss": 2.0 - s / 10, "exact_match": s / 20} for s in (0, 1, 3)]
    return {
        "method": name,
        "label": entries()[name].label,
        "init_seconds": 1.0,
        "train_seconds": 2.0,
        "train_loss": [2.0, 1.9, 1.8],
        "held_out": points,
    }


def test_a_base_in_four_bits_gets_something_back(tiny, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import LlamaForCausalLM

    # On some CPUs an evaluation packs four-bit layers, which these are too small for.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)

    def load(**options):
        return LlamaForCausalLM.from_pretrained(tiny, **options)

    monkeypatch.setattr(four_bits, "load_smollm2", load)
    monkeypatch.setattr(four_bits, "smollm2_folder", lambda: tiny)
    data = run.load_data(SETTINGS)
    full = run.score_held_out(load().eval(), SETTINGS, data, "full")
    found = four_bits.run_four_bits(SETTINGS, data)
    assert abs(found["loss_given_back"] - full.loss) < abs(found["loss"] - full.loss)


def test_report(tmp_path):
    pytest.importorskip("matplotlib")
    base = {"held_out": [{"step": 0, "loss": 2.0, "exact_match": 0.0}]}
    back = {"loss": 2.5, "loss_given_back": 2.1, "exact_match": 0.0, "init_seconds": 3.0}
    back["exact_match_given_back"] = 0.01
    results = [_result("lora"), _result("filet")]
    for quantized, count in ((None, 5), (back, 7)):
        lines = report.table(SETTINGS, base, quantized, results).splitlines()
        assert len(lines) == count
        assert len({len(line) for line in lines}) == 1
        assert "1.700" in lines[3]
        assert "15.0%" in lines[3]
        report.plot(tmp_path / "loss.png", SETTINGS, base, quantized, results, entries())
        assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert "2.100" in lines[-1]
    report.write_json(tmp_path / "results.json", SETTINGS, base, back, results)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["methods"] == results
    assert written["four_bits"] == back
    assert written["provenance"]["versions"]["torch"] == torch.__version__
