"""What a kill in PEFT's own ``save_pretrained`` leaves of a folder that held an adapter before.

PEFT writes the weights first and the configuration last, in the folder itself, and asks this package for
nothing before the configuration: new weights may lie under an old configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import lorainit
from tests.adapters import tiny
from tests.faults import file_operations
from tests.faults.saves import Case, Save, nothing

SaveModel = Callable[[PeftModel, Path], object]


def pefts_own(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(str(folder))


def adapter(method: Any, seed: int, **changes: Any) -> PeftModel:
    config = tiny.config(**changes)
    model = lorainit.get_peft_model(tiny.llama(), config, method=method, progress=False)
    tiny.train(model, seed=seed)
    return model


def kinds_after_kills(save: SaveModel, old: PeftModel, new: PeftModel, place: Path) -> set[str]:
    """What loads after kills at a dozen file operations: the old outputs, the new ones, others; or nothing."""
    outputs = {"old": tiny.logits(old), "new": tiny.logits(new)}
    case = Case.of(Save(lambda f: save(old, f), lambda f: save(new, f), nothing), place)
    found = set()
    for number in case.numbers(12):
        case.afresh()
        assert file_operations.dying(case.work, case.folder, number)
        try:
            loaded = tiny.logits(lorainit.load_adapter(tiny.llama(), case.folder))
        except lorainit.errors.LorainitError:
            found.add("refused")
            continue
        same = [
            name for name, wanted in outputs.items() if torch.allclose(loaded, wanted, 1e-5, 1e-6)
        ]
        found.add(same[0] if same else "neither")
    return found


@pytest.mark.parametrize(
    "method", [lorainit.Vanilla(), lorainit.PiSSA()], ids=["plain", "anchored"]
)
def test_over_an_adapter_of_the_same_configuration_nothing_is_mixed(
    method: Any, tmp_path: Path
) -> None:
    """As a training run does that saves into one folder again and again."""
    old, new = adapter(method, 2), adapter(method, 30)
    found = kinds_after_kills(pefts_own, old, new, tmp_path)
    assert {"old", "new"} <= found <= {"old", "new", "refused"}


@pytest.mark.parametrize(("save", "mixed"), [(pefts_own, True), (lorainit.save_adapter, False)])
def test_over_another_configuration_save_adapter_is_the_safe_way(
    save: SaveModel, mixed: bool, tmp_path: Path
) -> None:
    """The same shapes and another alpha, so that nothing but the outputs tells; PEFT's own is the control."""
    old = adapter(lorainit.Vanilla(), 2, lora_alpha=8)
    new = adapter(lorainit.Vanilla(), 30, lora_alpha=32)
    assert ("neither" in kinds_after_kills(save, old, new, tmp_path)) is mixed
