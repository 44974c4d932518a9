"""Layers that PEFT adapts and a start does not serve: why, or what to do about them before any work."""

from __future__ import annotations

import functools

import peft
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorainit.errors import TargetError
from lorainit.models.convolution import unserved
from lorainit.models.embedding import unserved_embedding


def why_left_out(name: str, module: nn.Module, rank: int) -> str | None:
    """Why a target keeps PEFT's own start; None: it is served, as far as this knows.

    Args:
        name: of the layer.
        module: the base layer.
        rank: of its adapter.

    Raises:
        TargetError: PEFT cannot adapt it either, which is said before any work.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return _of_convolution(name, module, rank)
    if isinstance(module, nn.Embedding):
        scaled = hasattr(module, "embed_scale") and not hasattr(BaseTunerLayer, "_get_embed_scale")
        if scaled and unserved_embedding(module) is None:
            return (
                f"this PEFT's adapter of a {type(module).__name__} does not scale as the layer does"
            )
        return unserved_embedding(module)
    if isinstance(module, nn.MultiheadAttention):
        return (
            "PEFT adds its MultiheadAttention adapter to the base weights in every forward and takes it off "
            "again, which rounds them: adapt linear layers instead to have it started"
        )
    return None


def _of_convolution(name: str, module: nn.Conv1d | nn.Conv2d, rank: int) -> str | None:
    kind = type(module).__name__
    if rank % module.groups:
        raise TargetError(
            f"layer '{name}' is a {kind} in {module.groups} groups, which PEFT adapts at ranks divisible by "
            f"{module.groups} only, not {rank}. Give it a rank_pattern, or leave it out with exclude_modules."
        )
    reason = unserved(module)
    if reason is not None:
        return reason
    if _is_dilated(module) and not _taken_over("dilation"):
        if module.padding != "same":
            raise TargetError(
                f"layer '{name}' is a {kind} with dilation {module.dilation}, which PEFT's adapter of it does "
                "not have, so that its output would not fit. Leave it out with exclude_modules."
            )
        return (
            f"PEFT's adapter of a {kind} has no dilation, so it is no change of the layer's weight"
        )
    padded = any(module._reversed_padding_repeated_twice)
    if padded and module.padding_mode != "zeros" and not _taken_over("padding_mode"):
        return (
            f"PEFT's adapter of a {kind} pads with zeros, and the layer by '{module.padding_mode}', so it is "
            "no change of the layer's weight"
        )
    return None


def _is_dilated(module: nn.Conv1d | nn.Conv2d) -> bool:
    pairs = zip(module.dilation, module.kernel_size, strict=True)
    return any(dilation > 1 and size > 1 for dilation, size in pairs)


@functools.cache
def _taken_over(attribute: str) -> bool:
    """Whether PEFT's first factor of a convolution has this attribute of the layer's (not in 0.18 to 0.21)."""
    with torch.random.fork_rng(devices=[]):
        layer = nn.Conv2d(1, 1, 3, padding=1, dilation=2, padding_mode="circular")
        model = peft.inject_adapter_in_model(
            LoraConfig(r=1, target_modules=["0"]), nn.Sequential(layer)
        )
    factor = model[0].lora_A["default"]
    return bool(getattr(factor, attribute) == getattr(layer, attribute))
