"""Weights rounded to few bits and back, as ``W -> Q``: plain grids, and the real libraries'.

What comes back is what a layer of the library multiplies by, so a plain linear layer that holds it computes
what the quantized one does (tests/life/test_quantized_kinds.py), at the speed of a plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from peft import LoraConfig
from torch import Tensor, nn

from lorainit.adapters.targets import match_targets

GROUP = 64
"""Weights that share a scale."""

SCALES = 256
"""Scales that share a scale, under double quantization."""

PLACES = 65536
"""Of a table that bitsandbytes looks scales up in on a CPU."""


def rounded(weight: Tensor, bits: int, *, offset: bool = True) -> Tensor:
    """Rounded to nearest in groups of `GROUP`: between least and largest, or evenly around zero."""
    groups = weight.reshape(-1, GROUP)
    if offset:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
        return (((groups - low) / step).round() * step + low).reshape(weight.shape)
    step = (groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp_min(1e-12)
    return ((groups / step).round() * step).reshape(weight.shape)


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""The values of a normal float of 4 bits (QLoRA, arXiv 2305.14314, appendix E)."""


def normal_float(weight: Tensor, *, double: bool = False) -> Tensor:
    """NF4 in blocks of 64: bitsandbytes' own values (to the bit on a CPU), without bitsandbytes.

    Args:
        weight: as many entries as whole blocks have.
        double: round the blocks' scales to 8 bits as well (`rounded_scales`); else they are float32.
    """
    values = torch.tensor(NF4, device=weight.device)
    groups = weight.reshape(-1, GROUP).float()
    scales = groups.abs().amax(-1, keepdim=True)
    nearest = _nearest(groups, scales, values)
    if double:
        scales = rounded_scales(scales)
    return (values[nearest] * scales).reshape(weight.shape).to(weight)


def dynamic_code(device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of bitsandbytes' dynamic 8-bit type, ascending (arXiv 1511.04561; 2110.02861).

    Zero, one, and in each decade from ``10^-7 .. 10^-6`` to ``0.1 .. 1`` the middles of 1, 2, 4, ... 64
    equal parts with either sign.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - decade) + 1)
        middles = 10**-decade * ((edges[1:] + edges[:-1]) / 2)
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found), device=device)


def rounded_scales(scales: Tensor) -> Tensor:
    """Scales of blocks as double quantization stores them (QLoRA, section 3), any shape.

    Less their mean, in blocks of 256 relative to the largest, rounded to `dynamic_code`. On a CPU, as
    bitsandbytes does there, by a table: relative numbers are rounded to one of `PLACES` before.
    """
    flat = scales.reshape(-1)
    mean = flat.mean()
    blocks = torch.nn.functional.pad(flat - mean, (0, -len(flat) % SCALES)).view(-1, SCALES)
    code = dynamic_code(scales.device)
    largest = blocks.abs().amax(-1, keepdim=True)
    places = PLACES if scales.device.type == "cpu" else None
    found = code[_nearest(blocks, largest, code, places)] * largest
    return (found.reshape(-1)[: len(flat)] + mean).reshape(scales.shape)


def _nearest(groups: Tensor, scales: Tensor, values: Tensor, places: int | None = None) -> Tensor:
    """Of the ascending `values`, the index nearest to each entry of a group over its scale."""
    between = (values[1:] + values[:-1]) / 2
    relative = (groups * (1.0 / scales.clamp_min(1e-38))).clamp(-1, 1)
    if places is not None:
        half = (places - 1) / 2
        relative = ((relative + 1) * half + 0.5).floor() / half - 1
    return torch.bucketize(relative, between)


def by_bitsandbytes(weight: Tensor, *, double: bool) -> Tensor:
    """NF4 in blocks of 64, the scales in float32 or quantized themselves."""
    from bitsandbytes import functional

    data, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=GROUP, quant_type="nf4", compress_statistics=double
    )
    found: Tensor = functional.dequantize_4bit(data, state)
    return found.to(weight)


def by_hqq(weight: Tensor, bits: int) -> Tensor:
    """HQQ in groups of 64."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    how = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
    device = str(weight.device)
    packed = HQQLinear(layer, how, compute_dtype=torch.float32, device=device)
    found: Tensor = packed.dequantize()
    return found.to(weight)


QUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "nf4": normal_float,
    "nf4-double": partial(normal_float, double=True),
    "rtn4": partial(rounded, bits=4),
    "rtn3": partial(rounded, bits=3),
    "rtn2": partial(rounded, bits=2),
    "hqq4": partial(by_hqq, bits=4),
    "hqq3": partial(by_hqq, bits=3),
    "hqq2": partial(by_hqq, bits=2),
}
"""By name; ``rtn``: round to nearest, with an offset."""


@torch.no_grad()
def quantize(model: nn.Module, kind: str, config: LoraConfig) -> None:
    """The weights of the layers that adapters go to replaced by their quantized copies, in place."""
    for name in match_targets(model, config).layers:
        weight = model.get_submodule(name).weight
        weight.copy_(QUANTIZERS[kind](weight.detach()))
