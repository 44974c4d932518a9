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


def normal_float(weight: Tensor) -> Tensor:
    """NF4 in blocks of 64 with float32 scales: bitsandbytes' own values, without bitsandbytes."""
    values = torch.tensor(NF4, device=weight.device)
    groups = weight.reshape(-1, GROUP).float()
    scales = groups.abs().amax(-1, keepdim=True)
    between = (values[1:] + values[:-1]) / 2
    nearest = torch.bucketize(groups / scales.clamp_min(1e-30), between)
    return (values[nearest] * scales).reshape(weight.shape).to(weight)


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
    "nf4-double": partial(by_bitsandbytes, double=True),
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
