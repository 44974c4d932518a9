"""What PyTorch and its tools do with an adapter: copies, graphs, places, precision and training steps."""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import accelerate
import torch
from peft import (
    PeftModel,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor
from torch.func import functional_call

import lorainit
from tests.adapters.operations import Found
from tests.adapters.started import (
    SCALING,
    Case,
    Pairs,
    inputs,
    out,
    pairs,
    paths,
    product,
    reference,
)

# Copies


def deepcopied(case: Case, folder: Path) -> Found:
    again = copy.deepcopy(case.model)
    for parameter in case.model.parameters():
        if parameter.is_floating_point():
            parameter.data.zero_()
    return [(out(again), case.dense("default"))]


def pickled(case: Case, folder: Path) -> Found:
    return [(out(pickle.loads(pickle.dumps(case.model))), case.dense("default"))]


def saved_whole(case: Case, folder: Path) -> Found:
    file = io.BytesIO()
    torch.save(case.model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    return [(out(again), case.dense("default"))]


# Compiling and exporting


def _layer(
    case: Case, adapters: tuple[str, ...] = ("default",)
) -> tuple[Any, tuple[Tensor, ...], list[Tensor]]:
    """An adapted layer, its inputs, and what it gives in float64 with each of these adapters."""
    if case.kind == "expert":
        case.model.get_base_model().set_experts_implementation("batched_mm")  # quickest to trace
    name = next(iter(case.changes["default"])).rpartition(".")[0]
    module = case.model.get_submodule(f"base_model.model.{name}")
    got: list[Any] = []
    hook = module.register_forward_pre_hook(lambda module, args: got.append(args))
    out(case.model)
    hook.remove()
    args = tuple(a.detach() for a in got[0])
    double = tuple(a.double() if a.is_floating_point() else a for a in args)
    plain = reference(case.kind).get_submodule(name)
    expected = []
    for adapter in adapters:
        weights = {
            key.removeprefix(name + "."): reference(case.kind).get_parameter(key) + delta
            for key, delta in case.changes[adapter].items()
            if key.startswith(name + ".")
        }
        expected.append(functional_call(plain, weights, double).detach())
    return module, args, expected


def compiled_layer(case: Case, folder: Path) -> Found:
    module, args, (expected,) = _layer(case)
    torch._dynamo.reset()
    with torch.no_grad():
        return [(torch.compile(module, backend="eager")(*args), expected)]


def hotswap_compiled(case: Case, folder: Path) -> Found:
    """Of a layer that is compiled, in a model that PEFT takes for compiled; nothing is compiled again."""
    case.model.save_pretrained(folder, selected_adapters=["second"])
    case.model.delete_adapter("second")
    rank = 2 * max(case.ranks)
    prepare_model_for_compiled_hotswap(case.model, target_rank=rank, check_compiled="ignore")
    layer, args, (first, second) = _layer(case, ("default", "second"))
    torch._dynamo.reset()
    layer.compile(backend="eager")
    with torch.no_grad():
        found = [(layer(*args), first)]
        hotswap_adapter(torch.compile(case.model, backend="eager"), folder / "second", "default")
        with torch.compiler.set_stance("fail_on_recompile"):
            return [*found, (layer(*args), second)]


def exported_layer(case: Case, folder: Path) -> Found:
    module, args, (expected,) = _layer(case)
    program = torch.export.export(module, args)
    return [(program.module()(*args).detach(), expected)]


def exported_folder(case: Case, folder: Path) -> Found:
    lorainit.export(case.model, folder)
    loaded = PeftModel.from_pretrained(case.fresh(), folder)
    return [(out(loaded), case.dense("default"))]


def offloaded(case: Case, folder: Path) -> Found:
    if case.kind == "expert":
        case.model.get_base_model().set_experts_implementation("eager")
    accelerate.cpu_offload(case.model, execution_device=torch.device("cpu"))
    return [(out(case.model), case.dense("default"))]


def half_precision(case: Case, folder: Path) -> Found:
    return [(out(case.model.to(torch.bfloat16)), case.dense("default"))]


# Training


def _gradients(case: Case) -> Pairs:
    """Of the loss on the inputs, by autograd through the dense weights in float64."""
    own = {
        name: tuple(t.clone().requires_grad_() for t in pair)
        for name, pair in case.trained["default"].items()
    }
    anchored = case.start == "anchored"
    change = {}
    for name, (a, b) in own.items():
        change[name] = product(case.kind, name, a, b)
        if anchored:
            change[name] = change[name] - product(case.kind, name, *case.starts["default"][name])
    loss = functional_call(
        reference(case.kind),
        case.weights([change]),
        kwargs=inputs() | {"labels": inputs()["input_ids"]},
        tie_weights=False,
    ).loss
    loss.backward()
    return {name: (a.grad, b.grad) for name, (a, b) in own.items()}  # type: ignore[misc]


def _backward(model: Any) -> None:
    model(**inputs(), labels=inputs()["input_ids"]).loss.backward()


def _held(model: Any) -> dict[str, tuple[Any, Any]]:
    """The parameters of the pairs, by the names of `pairs`."""
    parameters = dict(model.named_parameters())
    return {
        own: (parameters[path.format("A")], parameters[path.format("B")])
        for own, path in paths(model, "default").items()
    }


def gradients(case: Case, folder: Path) -> Found:
    _backward(case.model)
    expected = _gradients(case)
    held = _held(case.model)
    return [(held[name][side].grad, expected[name][side]) for name in expected for side in (0, 1)]


def checkpointed(case: Case, folder: Path) -> Found:
    case.model.train()
    case.model.enable_input_require_grads()
    case.model.gradient_checkpointing_enable()
    return gradients(case, folder)


def loraplus(case: Case, folder: Path) -> Found:
    """One step of SGD: B moves sixteen times as far for its gradient."""
    optimizer = create_loraplus_optimizer(
        case.model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=16.0
    )
    _backward(case.model)
    optimizer.step()
    now, gradient = pairs(case.model, "default"), _gradients(case)
    return [
        (now[name][side], case.trained["default"][name][side] - rate * gradient[name][side])
        for name in now
        for side, rate in ((0, 0.1), (1, 1.6))
    ]


def lorafa(case: Case, folder: Path) -> Found:
    """One step: A stays, B goes along the gradient in the metric of A, as Adam begins (weight decay 0)."""
    rate, eps = 1e-3, 1e-6
    optimizer = create_lorafa_optimizer(
        case.model, r=case.ranks[0], lora_alpha=int(SCALING * case.ranks[0]), lr=rate
    )
    _backward(case.model)
    optimizer.step()
    now, gradient, found = pairs(case.model, "default"), _gradients(case), []
    for name, (a, b) in case.trained["default"].items():
        square = a @ a.T + 1e-8 * torch.eye(len(a), dtype=a.dtype)
        direction = gradient[name][1] @ torch.linalg.inv(square) / SCALING**2
        first, second = 0.1 * direction, 0.001 * direction**2
        step = rate * math.sqrt(0.001) / 0.1 * first / (second.sqrt() + eps)
        found += [(now[name][0], a), (now[name][1] - b, -step)]
    return found


def optimizer_state(case: Case, folder: Path) -> Found:
    """AdamW keeps two numbers for every number of ``A`` and ``B``."""
    optimizer = torch.optim.AdamW([p for p in case.model.parameters() if p.requires_grad])
    _backward(case.model)
    optimizer.step()
    kept = sum(
        v.numel() for state in optimizer.state.values() for v in state.values() if v.dim() > 0
    )
    plain = sum(a.numel() + b.numel() for a, b in case.trained["default"].values())
    return [(torch.tensor(float(kept)), torch.tensor(2.0 * plain))]
