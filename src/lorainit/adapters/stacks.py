"""Factors of stacked parameters: how PEFT lays out one pair for each expert in one pair of matrices.

``lora_A`` is ``(experts * r, .)``, the experts outside; ``lora_B`` is ``(., r * experts)``, the
experts inside. PEFT before 0.19 takes the parameter's second dimension for the input's, whatever the
model says, and so adapts the transpose of an ``(out, in)`` matrix: its A is our ``B^T``.
"""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from lorainit.models.experts import expert_parameters


def is_stack(layer: LoraLayer) -> bool:
    """Whether the layer adapts a stacked parameter whose experts can be started from data."""
    return (
        isinstance(layer, ParamWrapper)
        and layer.num_experts > 1
        and layer.parameter_name in expert_parameters(layer.get_base_layer())
    )


def stacked_a(whole: Tensor, experts: int) -> Tensor:
    """``(experts, r, .)``, a view of a contiguous ``lora_A``."""
    return whole.reshape(experts, -1, whole.shape[1])


def stacked_b(whole: Tensor, experts: int) -> Tensor:
    """``(experts, ., r)``, a view of a contiguous ``lora_B``."""
    return whole.reshape(whole.shape[0], -1, experts).permute(2, 0, 1)


def in_peft(layer: ParamWrapper, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A pair of the expert's ``(out, in)`` matrix as PEFT wants it, or its pair as ours."""
    transposed = bool(getattr(layer.get_base_layer(), "is_transposed", False))
    as_stored = bool(getattr(layer, "_did_swap_in_out_features", False))
    return (a, b) if transposed or as_stored else (b.mT, a.mT)
