"""Bitsandbytes' four bits on CPUs with AVX512-BF16, where a layer that is evaluated changes its layout.

The first forward in eval mode packs the layer's weight for inference: the scales are rounded to bfloat16, and
the layer has no backward pass any more, so that nothing below it gets a gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lorainit.models.undo import surely

_PACKS = "support_avx512bf16_for_cpu"
"""A layer's attribute: whether its forward may pack the weight."""


def is_packed(weight: object) -> bool:
    """Whether a weight lies in the layout for inference."""
    state = getattr(weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def plain_layout(weight: Any) -> tuple[Tensor, Any]:
    """A packed weight's numbers and their state in the other layout; the scales stay rounded."""
    from bitsandbytes import functional

    packed = weight.quant_state
    # The inverse leaves the scales transposed, and would round those that were nested once more.
    state = copy.copy(packed)
    state.original_nested = False
    data, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = packed.absmax.T.reshape(-1).float()
    return data, state


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Inside, no four-bit layer is packed, and those that were have their other layout, with its backward.

    Afterwards every layer is as it was, to the bit. Packed weights are held in both layouts meanwhile.
    """
    with ExitStack() as stack:
        for layer in model.modules():
            if _PACKS not in vars(layer):
                continue
            stack.callback(surely, setattr, layer, _PACKS, vars(layer)[_PACKS])
            setattr(layer, _PACKS, False)
            weight: Any = layer._parameters["weight"]
            if is_packed(weight):
                stack.callback(surely, _lay, weight, weight.data, weight.quant_state)
                _lay(weight, *plain_layout(weight))
        yield


def _lay(weight: Any, data: Tensor, state: Any) -> None:
    weight.data = data
    weight.quant_state = state
