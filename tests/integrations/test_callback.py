"""A callback alone: a start after the optimizer is made, from the loader that training then reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lorainit
from lorainit.adapters.match_learning_rate import take_alpha_of
from lorainit.errors import AdapterError
from lorainit.integrations.callback import StartAdapter
from lorainit.integrations.fused_kernels import layers_called_one_by_one
from tests.adapters import tiny
from tests.trainers.test_optimizer import build, trained

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = {"displaced": lorainit.LoraDA(), "anchored": lorainit.LoraGA()}
"""To which a rate can be suggested on the few random rows."""


@pytest.mark.parametrize("kind", METHODS)
def test_training_is_that_of_a_start_before_the_optimizer(kind: str, tmp_path: Path) -> None:
    """All of the data is read, which must not turn the loader to its next epoch."""
    early = build(tmp_path)
    lorainit.start_trainer(early, METHODS[kind], progress=False)
    late = build(tmp_path, callbacks=[StartAdapter(METHODS[kind], progress=False)])
    losses = trained(late)
    assert losses == trained(early)
    assert losses != trained(build(tmp_path))


@pytest.mark.parametrize("kind", METHODS)
def test_an_adapter_is_matched_to_the_runs_rate(kind: str, tmp_path: Path) -> None:
    early = build(tmp_path, learning_rate=1e-3)
    lorainit.start_trainer(early, METHODS[kind], match_learning_rate=True, progress=False)
    callback = StartAdapter(METHODS[kind], match_learning_rate=True, progress=False)
    late = build(tmp_path, callbacks=[callback], learning_rate=1e-3)
    assert trained(late) == trained(early)
    resized = [t.model.peft_config["default"].origin.resized for t in (early, late)]
    assert resized[0] == resized[1] != 1


def test_a_matched_run_that_resumes_takes_the_scaling_of_its_checkpoint(tmp_path: Path) -> None:
    """Whose weights are read without it: at the configuration's own they would be another model."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def run(resume: bool | str, folder: Path = tmp_path, **changes: Any) -> Any:
        callback = StartAdapter(METHODS["displaced"], match_learning_rate=True, progress=False)
        trainer = build(folder, callbacks=[callback], **(settings | changes))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(False)
    again = run(str(tmp_path / "checkpoint-2"))
    first, second = (t.model.peft_config["default"].lora_alpha for t in (whole, again))
    assert first == second != tiny.config().lora_alpha
    for (name, one), (_, other) in zip(
        whole.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    torch.testing.assert_close(tiny.logits(again.model), tiny.logits(whole.model))
    with pytest.raises(AdapterError, match="whose lora_alpha is not known"):
        run(str(tmp_path / "checkpoint-2"), tmp_path / "elsewhere")


@pytest.mark.parametrize("match", [False, True])
def test_an_anchored_run_resumes_on_a_loaded_adapter(match: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def run(resume: bool | str, model: Any = None) -> Any:
        callback = StartAdapter(METHODS["anchored"], match_learning_rate=match, progress=False)
        trainer = build(tmp_path, callbacks=[callback], **settings)
        if model is not None:
            trainer.model = trainer.model_wrapped = model
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole, half = run(False), str(tmp_path / "checkpoint-2")
    again = run(half, lorainit.load_adapter(tiny.llama(), half))
    assert again.peft_config["default"].lora_alpha == whole.peft_config["default"].lora_alpha
    assert torch.equal(tiny.logits(again), tiny.logits(whole))
    # Control: into an adapter of the configured rank it does not go.
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(half)


def test_a_checkpoint_that_is_not_there_is_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with one slash in its name is a repository's name, too."""
    asked: list[Any] = []

    def download(*args: Any, **kwargs: Any) -> str:
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr("peft.config.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(tiny.llama(), tiny.config())
    with pytest.raises(AdapterError, match="whose lora_alpha is not known"):
        take_alpha_of(model, "default", Path("out") / "checkpoint-2")
    assert asked == []
    # Control: PEFT asks.
    with pytest.raises(ValueError, match="adapter_config"):
        LoraConfig.from_pretrained("out/checkpoint-2")
    assert asked


def test_a_run_that_resumes_is_left_alone(tmp_path: Path) -> None:
    calls: list[Any] = []

    class Counting(lorainit.LoraDA):
        def solve(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return super().solve(*args, **kwargs)

    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    callback = StartAdapter(Counting(), progress=False)

    def run(resume: bool) -> None:
        trainer = build(tmp_path, callbacks=[callback], **settings)
        trainer.train(resume_from_checkpoint=resume)

    run(False)
    first = len(calls)
    assert first > 0
    run(True)
    assert len(calls) == first


def _fused(function: Any) -> Any:
    function.__module__ = "axolotl.kernels.lora"
    return function


def test_fused_kernels_are_off_inside_and_back_afterwards() -> None:
    """Kernels that are hung on the modules, as axolotl does: without the context no hook sees the layers."""
    model = tiny.llama()
    weights = [layer.mlp for layer in model.model.layers]

    def reads_weights(mlp: Any) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
            return (torch.nn.functional.silu(gate) * up) @ mlp.down_proj.weight.T

        return _fused(forward)

    kernels = [reads_weights(mlp) for mlp in weights]
    for mlp, kernel in zip(weights, kernels, strict=True):
        mlp.forward = kernel
    arguments: dict[str, Any] = {"data": [tiny.batch()], "needs": ["gradient"], "progress": False}
    with layers_called_one_by_one(model):
        assert "forward" not in vars(weights[0])
        found = lorainit.collect_statistics(model, tiny.config(), **arguments)
    assert [vars(mlp)["forward"] for mlp in weights] == kernels
    expected = lorainit.collect_statistics(tiny.llama(), tiny.config(), **arguments)
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name].gradient, expected[name].gradient)
    past = lorainit.collect_statistics(model, tiny.config(), **arguments)
    assert not any("mlp" in name for name in past)


def test_a_kernel_of_unknown_form_is_refused() -> None:
    model = tiny.llama()
    model.model.layers[0].apply_in_proj_fused = _fused(lambda x: x)
    with (
        pytest.raises(AdapterError, match=r"layers\.0\.apply_in_proj_fused' is a fused kernel"),
        layers_called_one_by_one(model),
    ):
        pass
