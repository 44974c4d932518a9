"""An adapter's trained factors, read as targets see them: one pair a layer, one an expert."""

from __future__ import annotations

from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from lorainit.adapters.anchor import trained_of, whole_of
from lorainit.adapters.layers import (
    adapter_layers,
    is_anchored,
    is_embedding,
    name_in_patterns,
    takes_factors,
)
from lorainit.adapters.stacks import in_peft, is_stack, stacked_a, stacked_b
from lorainit.types import Factors


def factors_of(model: nn.Module, adapter_name: str) -> dict[str, Factors]:
    """The halves that are trained, whole where they are sharded; layers of other kinds are left out.

    Args:
        model: holds the adapter.
        adapter_name: of the adapter.

    Returns:
        By the targets' names, ``A`` ``(rank, in)`` and ``B`` ``(out, rank)`` as they are stored, without
        gradient; anchored where the layer is.
    """
    found: dict[str, Factors] = {}
    for name, layer in adapter_layers(model, adapter_name).items():
        if is_embedding(layer, adapter_name):
            a, b = (
                whole_of(holder[adapter_name].detach())
                for holder in (layer.lora_embedding_A, layer.lora_embedding_B)
            )
            found[name] = Factors(a, b)
            continue
        if not takes_factors(layer, adapter_name):
            continue
        holders = (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
        a, b = (whole_of(trained_of(holder).detach()) for holder in holders)
        anchored = is_anchored(layer, adapter_name)
        if not is_stack(layer):
            # Of a convolution the kernel is flattened.
            found[name] = Factors(a.flatten(1), b.flatten(1), anchored)
            continue
        assert isinstance(layer, ParamWrapper)
        stem, experts = name_in_patterns(name, layer), layer.num_experts
        pairs = zip(stacked_a(a, experts), stacked_b(b, experts), strict=True)
        for index, pair in enumerate(pairs):
            found[f"{stem}.{index}"] = Factors(*in_peft(layer, *pair), anchored)
    return found
