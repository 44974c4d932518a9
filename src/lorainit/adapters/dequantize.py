"""Quantized weights as numbers: a copy; nothing here writes to a module."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn

from lorainit.models.packed_layers import is_packed, plain_layout

_AT_ONCE = 1024
"""Columns of a weight that are read by one call of its layer."""

_SCALES = ("weight_scale_inv", "weight_scale")
"""What eight-bit floating weights are multiplied by, in transformers and compressed-tensors."""


def dequantized(module: nn.Module) -> Tensor:
    """The weight as the layer's forward uses it, floating, as the layer stores it otherwise.

    A layer that has no tensor ``weight`` (GPTQ, AWQ and their like), or one whose numbers mean nothing
    without scales that are not known here, is asked by its own forward: ``W e_i`` of every unit vector.

    Raises:
        Exception: whatever the layer's own reader or forward raises.
    """
    weight = getattr(module, "weight", None)
    # PEFT's own reader of modules stores a copy in the module, on a CPU.
    if isinstance(weight, Tensor) and hasattr(weight, "quant_state"):
        return _from_4bit(weight)
    if isinstance(weight, Tensor) and _is_int8(weight):
        return _from_int8(module, weight)
    if isinstance(weight, Tensor) and type(weight).__module__.startswith("torchao"):
        plain: Tensor = weight.dequantize()  # type: ignore[no-untyped-call]
        return plain.detach()
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() == 1:
        return _from_fp8(module, weight.detach())
    if isinstance(weight, Tensor) or hasattr(module, "W_q"):
        read = torch.as_tensor(dequantize_module_weight(module)).detach()
        if read.is_floating_point():
            return read
    return _by_forward(module)


def _is_int8(weight: Tensor) -> bool:
    return type(weight).__name__ == "Int8Params" and not weight.is_floating_point()


def _from_4bit(weight: Any) -> Tensor:
    """Bitsandbytes' four bits, in whichever of its two layouts they lie."""
    if not is_packed(weight):
        return torch.as_tensor(dequantize_bnb_weight(weight)).detach()
    # Its own reader does not know this one.
    from bitsandbytes import functional

    plain: Tensor = functional.dequantize_4bit(*plain_layout(weight))
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


def _from_fp8(module: nn.Module, weight: Tensor) -> Tensor:
    """Eight-bit floating numbers times their scales: one, one a row, or one a block; or without any."""
    scale = next((s for n in _SCALES if isinstance(s := getattr(module, n, None), Tensor)), None)
    if scale is None:
        # Three bits of mantissa and five of exponent at most: exact.
        return weight.to(torch.bfloat16)
    rows, columns = weight.shape
    scale = scale.detach().float()
    if scale.numel() == 1:
        return weight.float() * scale.reshape(())
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    sizes = getattr(module, "block_size", None) or (
        -(-rows // scale.shape[0]),
        -(-columns // scale.shape[1]),
    )
    for axis, (size, length) in enumerate(zip(sizes, weight.shape, strict=True)):
        repeats = length if scale.shape[axis] == 1 else int(size)
        scale = scale.repeat_interleave(repeats, axis).narrow(axis, 0, length)
    return weight.float() * scale


def _by_forward(module: nn.Module) -> Tensor:
    """``(out, in)`` from the layer's outputs at the unit vectors, its bias taken off."""
    columns: int = module.in_features  # type: ignore[assignment]
    tensors = [*module.parameters(), *module.buffers()]
    device = next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))
    wide = (t.dtype for t in tensors if t.is_floating_point() and t.element_size() > 1)
    dtype = next(wide, torch.float32)
    # Past the module's hooks, which statistics may be taken by.
    base: Tensor = module.forward(torch.zeros(1, columns, dtype=dtype, device=device))
    parts = []
    for first in range(0, columns, _AT_ONCE):
        count = min(_AT_ONCE, columns - first)
        units = torch.zeros(count, columns, dtype=dtype, device=device)
        units[torch.arange(count), torch.arange(first, first + count)] = 1
        parts.append(module.forward(units) - base)
    return torch.cat(parts).mT.detach()
