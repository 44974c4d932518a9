"""Whatever raises inside the package, and wherever: model, files and random state are as they were.

A short form, a few call sites of each operation; ``python -m tools.faults`` takes them all.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lorainit
from tests.adapters import tiny
from tests.faults.call_sites import Injected
from tests.faults.injection import Disturbed, disturb
from tests.faults.operations import Operation, operations
from tests.faults.states import differences, state_of

NAMES = (
    "collect_statistics", "collect_statistics, experts", "get_peft_model, new", "get_peft_model, second",
    "get_peft_model, restarted", "get_peft_model, in place", "get_peft_model, measured",
    "load_adapter", "save", "load", "save_adapter", "export", "init", "collect",
)  # fmt: skip


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Operation]:
    found = operations(tmp_path_factory.mktemp("made"))
    assert set(found) == set(NAMES)
    return found


@pytest.mark.skipif(sys.gettrace() is not None, reason="somebody else traces")
@pytest.mark.parametrize("name", NAMES)
def test_as_it_was(name: str, every: dict[str, Operation], tmp_path: Path) -> None:
    tally = disturb(name, every[name], tmp_path, most=3, seed=len(name))
    assert tally.injected >= 3
    assert not tally.broken, "\n".join(tally.broken)


@pytest.mark.skipif(sys.gettrace() is not None, reason="somebody else traces")
def test_what_is_one_for_the_process_is_as_it_was(
    every: dict[str, Operation], tmp_path: Path
) -> None:
    """All call sites where the compiler's stance, generators and threads are looked after."""
    disturbed = Disturbed("collect_statistics", every["collect_statistics"], tmp_path)
    faults = [f for f in disturbed.faults(0) if f.site[0].endswith("models/state.py")]
    assert len(faults) > 20
    broken = {f.key: found for f in faults if (found := disturbed.inject(f))}
    assert not broken


def test_what_is_not_put_back_is_seen(tmp_path: Path) -> None:
    """The negative control: an operation that changes a weight and then fails."""

    def careless(model: Any, _: Path) -> None:
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        lorainit.get_peft_model(model, None, progress=False)

    model = tiny.llama()
    before = state_of(model)
    with pytest.raises(lorainit.errors.LorainitError):
        careless(model, tmp_path)
    assert differences(before, state_of(model)) == ["tensor lm_head.weight"]


class _Closed:
    """A pipe that nobody reads any more."""

    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("how", ["closed pipe", "raising handler"])
@pytest.mark.parametrize("which", ["new", "restarted"])
def test_the_last_line_of_output(
    how: str, which: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.llama()
    if which == "restarted":
        model = lorainit.get_peft_model(
            model, tiny.config(), method=lorainit.PiSSA(), progress=False
        )
        tiny.train(model)
    caplog.set_level("INFO", "lorainit")
    before = state_of(model)
    if how == "closed pipe":
        monkeypatch.setattr(sys, "stderr", _Closed())
    else:

        def raising(record: Any) -> None:
            raise Injected

        monkeypatch.setattr(caplog.handler, "emit", raising)
    with pytest.raises((Injected, OSError)):
        lorainit.get_peft_model(
            model, None if which == "restarted" else tiny.config(), method=lorainit.OLoRA()
        )
    monkeypatch.undo()
    assert not differences(before, state_of(model))


def test_pefts_hook_on_checkpointed_models_goes() -> None:
    model = tiny.llama()
    model.gradient_checkpointing_enable()
    before = state_of(model)

    class Failing(lorainit.PiSSA):
        def solve(self, *_: Any) -> Any:
            raise Injected

    with pytest.raises(Injected):
        lorainit.get_peft_model(model, tiny.config(), method=Failing(), progress=False)
    assert not differences(before, state_of(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorainit.adapters.install.install", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lorainit.get_peft_model(model, tiny.config(), method=lorainit.PiSSA(), progress=False)
    assert not differences(before, state_of(model))
    lorainit.get_peft_model(model, tiny.config(), method=lorainit.PiSSA(), progress=False)
    assert any("_forward_hooks" in name for name in differences(before, state_of(model)))


def test_what_a_forward_pass_writes_is_put_back() -> None:
    """As spectral norm and batch norm do, in models that must stay in train mode."""
    model = tiny.llama()
    layer = model.model.layers[0].input_layernorm
    layer.register_buffer("seen", torch.zeros(3))

    def count(module: Any, *_: Any) -> None:
        module.seen.add_(1)

    layer.register_forward_hook(count)
    before = state_of(model)
    lorainit.collect_statistics(
        model, tiny.config(), data=[tiny.batch()], needs={"gradient"}, progress=False
    )
    assert not differences(before, state_of(model))
    model(**tiny.batch())
    assert differences(before, state_of(model)) == ["tensor model.layers.0.input_layernorm.seen"]


def test_a_loader_gives_its_order_again() -> None:
    from torch.utils.data import DataLoader

    rows = [{k: v[i] for k, v in tiny.batch(8).items()} for i in range(8)]
    loader = DataLoader(
        rows, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    state = loader.generator.get_state()
    lorainit.collect_statistics(
        tiny.llama(), tiny.config(), data=loader, needs={"input_mean"}, progress=False
    )
    assert torch.equal(loader.generator.get_state(), state)
    next(iter(loader))
    assert not torch.equal(loader.generator.get_state(), state)
