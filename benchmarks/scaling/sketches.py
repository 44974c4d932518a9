"""Statistics and factors compared over processes, by sketches and digests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorainit
from benchmarks.scaling.cases import Case
from benchmarks.scaling.processes import Machine

SKETCH = 16

REFERENCE = "reference.pt"


def _random(size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, SKETCH, generator=generator, dtype=torch.float64).to(device)


def sketch(tensor: Tensor) -> Tensor:
    """``(16, 16)`` of a matrix, ``(16,)`` of a vector, float64 on the CPU."""
    left = _random(tensor.shape[0], tensor.device)
    found = left.mT @ tensor.double()
    if tensor.dim() == 2:
        found = found @ _random(tensor.shape[1], tensor.device)
    return found.cpu()


def sketches(statistics: lorainit.Statistics, machine: Machine) -> dict[str, Tensor]:
    """Of every statistic of every layer, from whichever process holds it."""
    own = {
        f"{name} {field}": sketch(tensor)
        for name, layer in statistics.items()
        for field in layer.TENSORS
        if (tensor := getattr(layer, field)) is not None
    }
    found: dict[str, Tensor] = {}
    for theirs in machine.gathered(own):
        found |= theirs
    return found


@torch.no_grad()
def factor_sketches(model: nn.Module) -> dict[str, Tensor]:
    """Of ``B A`` of every layer."""
    tensors = dict(model.named_parameters())
    found = {}
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            left = _random(b.shape[0], b.device).mT @ b.double()
            found[f"{name} product"] = (left @ (a.double() @ _random(a.shape[1], a.device))).cpu()
    return found


def distances(found: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Any]:
    """Relative distances by kind of statistic: the median and the largest over the layers."""
    if set(found) != set(reference):
        return {"error": f"{len(set(found) ^ set(reference))} statistics are not in both"}
    kinds: dict[str, list[float]] = {}
    for key, value in found.items():
        other = reference[key]
        scale = float(other.norm()) or 1.0
        kinds.setdefault(key.split(" ")[1], []).append(float((value - other).norm()) / scale)
    return {
        kind: {"median": sorted(values)[len(values) // 2], "largest": max(values)}
        for kind, values in kinds.items()
    }


def factors_of(model: nn.Module) -> list[Tensor]:
    """An adapter's tensors that every process holds whole, in the modules' order."""
    base = model.get_base_model()
    return [
        tensor.data
        for name, tensor in (*base.named_parameters(), *base.named_buffers())
        if "lora_" in name and not hasattr(tensor, "device_mesh")
    ]


def digest(tensors: list[Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def compared(
    case: Case, what: str, found: dict[str, Tensor], machine: Machine, folder: Path
) -> dict[str, Any]:
    """Keep the one process's sketches, or say how far these are from them."""
    if machine.rank:
        return {}
    path = folder / f"{what} {case.key} {REFERENCE}".replace(" ", "-")
    if machine.world == 1:
        save_file({key: value.cpu().contiguous().clone() for key, value in found.items()}, path)
        return {}
    if not path.exists():
        return {"error": "no reference: launch with one process first"}
    return distances({key: value.cpu() for key, value in found.items()}, load_file(path))
