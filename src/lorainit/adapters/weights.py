"""Reading base weights as ``(out, in)``, whatever they are stored as. Nothing here writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorainit.adapters.dequantize import dequantized
from lorainit.adapters.targets import weight_shape
from lorainit.errors import AdapterError, NonFiniteError, first_line
from lorainit.linalg import all_finite
from lorainit.models.introspection import execution_device
from lorainit.models.offload_hooks import stored_weights
from lorainit.parallel.partitioned import is_partitioned, whole

FINGERPRINT_SIZE = 32
_SIMILAR = 0.9


def read_weight(module: nn.Module, name: str) -> Tensor:
    """The layer's weight, detached, ``(out, in)``, floating: dequantized, gathered, transposed.

    One that accelerate keeps on the host or on disk is brought to the device that uses it.

    Raises:
        AdapterError: the weight cannot be read as a matrix of the layer's shape.
        NonFiniteError: the weight has values that are not finite.
    """
    with whole(module.parameters(recurse=False)):
        weight = _floating(module, name)
        if is_partitioned(getattr(module, "weight", None)):
            weight = weight.clone()
    if (place := execution_device(module)) is not None:
        weight = weight.to(place)
    if isinstance(module, Conv1D | nn.Embedding):
        weight = weight.mT
    expected = weight_shape(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        weight = weight.flatten(1)
    if tuple(weight.shape) != expected:
        raise AdapterError(
            f"layer '{name}' ({type(module).__name__}) stores its weight as {tuple(weight.shape)}, "
            f"which cannot be read as {expected}. Leave it out with exclude_modules."
        )
    if not bool(all_finite(weight)):
        raise NonFiniteError(_not_finite(name))
    return weight


def part_of_gather(module: nn.Module) -> None:
    """What `read_weight` asks of the other processes: give this one's part of a sharded weight."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and hasattr(weight, "full_tensor"):
        weight.full_tensor()
    with whole(module.parameters(recurse=False)):
        pass


def _floating(module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.device.type == "meta":
        stored = stored_weights(module)
        if stored is not None:
            offloaded: Tensor = stored["weight"]
            return offloaded.detach()
        raise AdapterError(
            f"the weight of layer '{name}' is on the meta device: load the model's weights first."
        )
    with torch.no_grad():
        if isinstance(weight, Tensor) and hasattr(weight, "full_tensor"):
            gathered: Tensor = weight.full_tensor()
            return gathered.detach()
        # Transformers gives HQQ's layers an empty `weight`, that their dtype can be asked for.
        if isinstance(weight, Tensor) and _is_plain(weight) and not hasattr(module, "W_q"):
            return weight.detach()
        try:
            return dequantized(module)
        except Exception as error:  # whatever the layer's own reader or forward raises
            raise AdapterError(
                f"the weight of layer '{name}' ({type(module).__name__}) cannot be dequantized: "
                f"{first_line(error)}. "
                "Leave the layer out with exclude_modules."
            ) from error


def fingerprints(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """At most `FINGERPRINT_SIZE` entries of every weight, evenly spread, float32 on the CPU.

    A weight that cannot be read has none. Of a weight that ``fully_shard`` cut by rows, each process
    looks into its own rows, and only the entries travel, all layers' together; all processes must call it.
    """
    found: dict[str, Tensor] = {}
    sent: dict[Any, dict[str, Tensor]] = {}
    for name, module in modules.items():
        shape = weight_shape(module)
        rows, columns = read_weight(module, name).shape if shape is None else shape
        places = _places(rows, columns)
        shard = _entries_of_shard(module, *places)
        if shard is None:
            try:
                matrix = read_weight(module, name)
            except AdapterError:
                continue
            found[name] = fingerprint(matrix)
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
    return {name: found[name] for name in modules if name in found}


def fingerprint(weight: Tensor) -> Tensor:
    """The entries of one weight ``(out, in)`` that `fingerprints` takes, float32 on the CPU."""
    rows, columns = (place.to(weight.device) for place in _places(*weight.shape))
    return weight[rows, columns].float().cpu()


def _places(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of a fingerprint's entries."""
    count = min(FINGERPRINT_SIZE, rows * columns)
    # In integers: float32 would round the last index of a large weight past its end, and some
    # devices have no float64.
    index = torch.arange(count) * (rows * columns - 1) // max(count - 1, 1)
    return index // columns, index % columns


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
    if isinstance(module, Conv1D | nn.Embedding):
        rows, columns = columns, rows
    with torch.no_grad():
        own = weight.to_local().flatten(1)
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
        and not type(weight).__module__.startswith("torchao")
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
