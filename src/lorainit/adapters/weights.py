"""Reading base weights as ``(out, in)``, whatever they are stored as. Nothing here writes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorainit.adapters.targets import weight_shape
from lorainit.errors import AdapterError, NonFiniteError
from lorainit.linalg import all_finite

FINGERPRINT_SIZE = 32
_SIMILAR = 0.9


def read_weight(module: nn.Module, name: str) -> Tensor:
    """The layer's weight, detached, ``(out, in)``, floating: dequantized, gathered, transposed.

    Raises:
        AdapterError: the weight cannot be read as a matrix of the layer's shape.
        NonFiniteError: the weight has values that are not finite.
    """
    weight = _floating(module, name)
    if isinstance(module, Conv1D):
        weight = weight.mT
    expected = weight_shape(module)
    if tuple(weight.shape) != expected:
        raise AdapterError(
            f"layer '{name}' ({type(module).__name__}) stores its weight as {tuple(weight.shape)}, "
            f"which cannot be read as {expected}. Leave it out with exclude_modules."
        )
    # Eight bits have no norm.
    finite = all_finite(weight) if weight.element_size() > 1 else torch.isfinite(weight).all()
    if not bool(finite):
        raise NonFiniteError(_not_finite(name))
    return weight


def part_of_gather(module: nn.Module) -> None:
    """What `read_weight` asks of the other processes: give this one's part of a sharded weight."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and hasattr(weight, "full_tensor"):
        weight.full_tensor()


def _floating(module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.device.type == "meta":
        hook = getattr(module, "_hf_hook", None)
        stored = getattr(hook, "weights_map", None)
        if stored is not None:
            offloaded: Tensor = stored["weight"]
            return offloaded.detach()
        raise AdapterError(
            f"the weight of layer '{name}' is on the meta device: load the model's weights first."
        )
    with torch.no_grad():
        if isinstance(weight, Tensor) and hasattr(weight, "full_tensor"):
            whole: Tensor = weight.full_tensor()
            return whole.detach()
        # PEFT's own reader of modules stores a copy in the module, on a CPU.
        if isinstance(weight, Tensor) and hasattr(weight, "quant_state"):
            return _from_4bit(weight)
        if isinstance(weight, Tensor) and _is_int8(weight):
            return _from_int8(module, weight)
        if isinstance(weight, Tensor) and (scales := _scales_of_float8(module, weight)) is not None:
            return _from_float8(module, weight, scales)
        if isinstance(weight, Tensor) and type(weight).__module__.startswith("torchao"):
            plain: Tensor = weight.dequantize()  # type: ignore[no-untyped-call]
            return plain.detach()
        if isinstance(weight, Tensor) and _is_plain(weight):
            return weight.detach()
        try:
            return torch.as_tensor(dequantize_module_weight(module)).detach()
        except (TypeError, NotImplementedError, AttributeError) as error:
            raise AdapterError(
                f"the weight of layer '{name}' ({type(module).__name__}) cannot be dequantized: "
                f"{error}. "
                "Leave the layer out with exclude_modules."
            ) from error


def _is_int8(weight: Tensor) -> bool:
    return type(weight).__name__ == "Int8Params" and not weight.is_floating_point()


def _from_4bit(weight: Any) -> Tensor:
    """Bitsandbytes' four bits, in whichever of its two layouts they lie."""
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        return torch.as_tensor(dequantize_bnb_weight(weight)).detach()
    # On some CPUs the first forward lays them out anew, which its own reader does not know; its
    # inverse leaves the scales transposed.
    from bitsandbytes import functional

    scales = weight.quant_state.absmax.T.reshape(-1).float()
    data, state = functional._convert_weight_packed_for_cpu_inverse(
        weight.data, copy.copy(weight.quant_state)
    )
    state.absmax, state.nested = scales, False
    plain: Tensor = functional.dequantize_4bit(data, state)
    return plain.detach()


def _from_int8(module: nn.Module, weight: Any) -> Tensor:
    """Bitsandbytes' eight bits: rows of integers, each with the absolute maximum of the row."""
    scales = getattr(weight, "SCB", None)
    if scales is None:
        # Moved there by the layer's first forward.
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if scales is None:
        raise TypeError("its scales are not there")
    found: Tensor = weight.data.float() * (scales.to(weight.device).float().unsqueeze(1) / 127)
    return found


def _scales_of_float8(module: nn.Module, weight: Tensor) -> Tensor | None:
    """What an eight-bit float weight is multiplied by: one number, one a row, or one a block."""
    if not weight.is_floating_point() or weight.element_size() > 1:
        return None
    found = (getattr(module, name, None) for name in ("weight_scale_inv", "weight_scale"))
    return next((scales for scales in found if isinstance(scales, Tensor)), None)


def _from_float8(module: nn.Module, weight: Tensor, scales: Tensor) -> Tensor:
    """Eight-bit floats of transformers' fine-grained and row-wise forms, in float32."""
    scales = scales.detach().to(weight.device).float()
    if scales.numel() > 1:
        if scales.dim() == 1:
            scales = scales.unsqueeze(1)
        block = getattr(module, "block_size", None)
        for dim, size in enumerate(weight.shape):
            # The last block may be shorter than the others.
            length = block[dim] if block is not None else -(-size // scales.shape[dim])
            scales = scales.repeat_interleave(length, dim).narrow(dim, 0, size)
    return weight.detach().float() * scales


def fingerprints(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """At most `FINGERPRINT_SIZE` entries of every weight, evenly spread, float32 on the CPU.

    Of a weight that ``fully_shard`` cut by rows, each process looks into its own rows, and only the
    entries travel, all layers' together; all processes must call it.
    """
    found: dict[str, Tensor] = {}
    sent: dict[Any, dict[str, Tensor]] = {}
    for name, module in modules.items():
        shape = weight_shape(module)
        rows, columns = read_weight(module, name).shape if shape is None else shape
        count = min(FINGERPRINT_SIZE, rows * columns)
        # In integers: float32 would round the last index of a large weight past its end, and some
        # devices have no float64.
        index = torch.arange(count) * (rows * columns - 1) // max(count - 1, 1)
        shard = _entries_of_shard(module, index // columns, index % columns)
        if shard is None:
            flat = read_weight(module, name).reshape(-1)
            found[name] = flat[index.to(flat.device)].float().cpu()
        else:
            sent.setdefault(shard[1], {})[name] = shard[0]
    for group, parts in sent.items():
        together = torch.cat(list(parts.values()))
        dist.all_reduce(together, group=group)
        sizes = [len(part) for part in parts.values()]
        for name, part in zip(parts, torch.split(together.cpu(), sizes), strict=True):
            if float(part[-1]) != 0:
                raise NonFiniteError(_not_finite(name))
            found[name] = part[:-1].clone()
    return {name: found[name] for name in modules}


def _entries_of_shard(
    module: nn.Module, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Any] | None:
    """What this process has of a weight that is cut by rows over one group, and the group.

    Zero where another process has it; then a number above zero if the shard is not finite. None for any
    other weight. Nothing waits for the device.
    """
    weight = getattr(module, "weight", None)
    mesh = getattr(weight, "device_mesh", None)
    if not isinstance(weight, Tensor) or mesh is None or not _is_plain(weight):
        return None
    from torch.distributed.tensor import DTensor, Shard

    if mesh.ndim != 1 or not isinstance(weight, DTensor) or weight.placements[0] != Shard(0):
        return None
    if isinstance(module, Conv1D):
        rows, columns = columns, rows
    with torch.no_grad():
        own = weight.to_local()
        # Rows are cut as torch.chunk cuts them.
        first = mesh.get_local_rank() * -(-weight.shape[0] // mesh.size())
        mine = ((rows >= first) & (rows < first + own.shape[0])).nonzero().squeeze(1)
        sent = torch.zeros(len(rows) + 1, device=own.device)
        places = (rows[mine] - first).to(own.device), columns[mine].to(own.device)
        sent[mine.to(own.device)] = own[places].float()
        sent[-1] = (~torch.isfinite(own)).any().float()
        kind = str(mesh.device_type)
        if kind != "cpu":
            sent = sent.to(torch.device(kind, torch.get_device_module(kind).current_device()))
    return sent, mesh.get_group()


def _is_plain(weight: Tensor) -> bool:
    """Whether its entries are the weight's own numbers."""
    return (
        weight.is_floating_point()
        and weight.element_size() > 1
        and not hasattr(weight, "quant_state")
    )


def _not_finite(name: str) -> str:
    return (
        f"the weight of layer '{name}' has values that are not finite: the checkpoint is damaged, or "
        "was converted to a dtype that cannot hold it."
    )


def same_weight(first: Tensor, second: Tensor) -> bool:
    """Whether two fingerprints are of one weight, up to the rounding of another dtype."""
    if first.shape != second.shape:
        return False
    norms = first.norm() * second.norm()
    return bool(norms == 0) or float((first * second).sum() / norms) > _SIMILAR
