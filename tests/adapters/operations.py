"""What may be done with an adapter: each operation on a `Case` gives what was found beside what is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from peft import (
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils import merge_utils
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor
from torch.func import functional_call

import lorainit
from tests.adapters.started import (
    Case,
    Given,
    inputs,
    lora,
    out,
    pairs,
)

Found = list[tuple[Tensor, Tensor]]
Operation = Callable[[Case, Path], Found]


# Merging


def merge(case: Case, folder: Path) -> Found:
    case.model.merge_adapter()
    return [(out(case.model), case.dense("default"))]


def safe_merge(case: Case, folder: Path) -> Found:
    case.model.merge_adapter(safe_merge=True)
    return [(out(case.model), case.dense("default"))]


def unmerge(case: Case, folder: Path) -> Found:
    case.model.merge_adapter()
    case.model.unmerge_adapter()
    found = [(out(case.model), case.dense("default"))]
    with case.model.disable_adapter():
        return [*found, (out(case.model), case.dense())]


def merge_and_unload(case: Case, folder: Path) -> Found:
    return [(out(case.model.merge_and_unload()), case.dense("default"))]


def unload(case: Case, folder: Path) -> Found:
    return [(out(case.model.unload()), case.dense())]


# Several adapters, and none


def disable(case: Case, folder: Path) -> Found:
    with case.model.disable_adapter():
        off = out(case.model)
    return [(off, case.dense()), (out(case.model), case.dense("default"))]


def switch(case: Case, folder: Path) -> Found:
    case.model.set_adapter("second")
    found = [(out(case.model), case.dense("second"))]
    case.model.set_adapter("default")
    return [*found, (out(case.model), case.dense("default"))]


def several_active(case: Case, folder: Path) -> Found:
    case.model.base_model.set_adapter(["default", "second"])
    return [(out(case.model), case.dense("default", "second"))]


def mixed_batch(case: Case, folder: Path) -> Found:
    names = ["default", "second", "__base__", "second"]
    mixed = out(case.model, adapter_names=names)
    expected = [
        case.dense(*([] if name == "__base__" else [name]), rows=row)
        for row, name in enumerate(names)
    ]
    return [(mixed, torch.stack(expected))]


def delete_and_start_again(case: Case, folder: Path) -> Found:
    case.model.delete_adapter("default")
    found = [(out(case.model), case.dense("second"))]
    again = case.started(seed=0)
    config = lora(case.kind, case.ranks[0])
    lorainit.get_peft_model(
        case.model, config, method=Given(case.start, 0), adapter_name="default", progress=False
    )
    case.model.set_adapter("default")
    expected = case.dense_of([case.begun["default"]])
    return [*found, (out(case.model), expected), (out(again), expected)]


def reset(case: Case, folder: Path) -> Found:
    """``reset_lora_parameters`` writes a random A and a zero B: then the adapter adds nothing."""
    for module in case.model.modules():
        if hasattr(module, "reset_lora_parameters"):
            module.reset_lora_parameters("default", True)
    return [(out(case.model), case.dense())]


def combine(how: str) -> Operation:
    """``add_weighted_adapter``, against the same operation on the changes of the weights."""

    def run(case: Case, folder: Path) -> Found:
        weights, density = [0.7, 0.4], 0.5
        with mock.patch.object(merge_utils, "random_pruning", _every_other):
            case.model.add_weighted_adapter(
                ["default", "second"], weights, "both", how, svd_rank=16, density=density
            )
            case.model.set_adapter("both")
            return [(out(case.model), case.dense_of([expected(case, weights, density)]))]

    def expected(case: Case, weights: list[float], density: float) -> dict[str, Tensor]:
        change = {}
        for name in case.changes["default"]:
            parts = [case.changes[adapter][name].float() for adapter in ("default", "second")]
            w = torch.tensor(weights)
            kind = how.removesuffix("_svd")
            if kind in ("svd", "cat", "linear"):
                whole = w[0] * parts[0] + w[1] * parts[1]
            elif kind == "dare_linear":
                whole = merge_utils.dare_linear(parts, w, density)
            elif kind == "magnitude_prune":
                whole = merge_utils.magnitude_prune(parts, w, density)
            else:
                whole = getattr(merge_utils, kind)(parts, w, density, "total")
            change[name] = whole.double()
        return change

    return run


def _every_other(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """In place of PEFT's random half."""
    kept = torch.arange(tensor.numel()).reshape(tensor.shape) % 2 == 0
    return torch.where(kept, tensor / density if rescale else tensor, 0.0)


# Hot swapping


def hotswap(case: Case, folder: Path) -> Found:
    case.model.save_pretrained(folder, selected_adapters=["second"])
    hotswap_adapter(case.model, folder / "second", "default")
    return [(out(case.model), case.dense("second"))]


# Saving and loading


def load_by_peft(case: Case, folder: Path) -> Found:
    case.model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(case.fresh(), folder)
    return [(out(loaded), case.dense("default"))]


def load(case: Case, folder: Path) -> Found:
    case.model.save_pretrained(folder)
    loaded = lorainit.load_adapter(case.fresh(), folder)
    own, again = pairs(case.model, "default"), pairs(loaded, "default")
    found = [(again[name][side], own[name][side]) for name in own for side in (0, 1)]
    return [*found, (out(loaded), case.dense("default"))]


def load_low_cpu_mem(case: Case, folder: Path) -> Found:
    case.model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(case.fresh(), folder, low_cpu_mem_usage=True)
    return [(out(loaded), case.dense("default"))]


def load_beside(case: Case, folder: Path) -> Found:
    case.model.save_pretrained(folder)
    case.model.load_adapter(folder, "loaded")
    case.model.set_adapter("loaded")
    return [(out(case.model), case.dense("default"))]


def peft_state_dict(case: Case, folder: Path) -> Found:
    other = case.started()
    set_peft_model_state_dict(other, get_peft_model_state_dict(case.model))
    return [(out(other), case.dense("default"))]


def state_dict(assign: bool) -> Operation:
    def run(case: Case, folder: Path) -> Found:
        other = case.started()
        other.load_state_dict(case.model.state_dict(), assign=assign)
        return [(out(other), case.dense("default"))]

    return run


def call_functionally(names: str) -> Operation:
    def run(case: Case, folder: Path) -> Found:
        other = case.started() if names == "state_dict" else case.model
        given = getattr(case.model, names)()
        values = {k: v.detach() for k, v in dict(given).items() if "lora_" in k}
        found = functional_call(other.eval(), values, kwargs=inputs()).logits
        return [(found, case.dense("default"))]

    return run
