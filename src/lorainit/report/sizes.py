"""How far a start moves every layer."""

from __future__ import annotations

import torch
from peft import PeftModel

from lorainit.adapters.anchor import trained_of
from lorainit.adapters.layers import adapter_layers, is_linear
from lorainit.adapters.weights import read_weight
from lorainit.solve.layers import relative_size
from lorainit.types import Factors


def sizes_of(model: PeftModel, adapter_name: str = "default") -> dict[str, float]:
    """``|s B A| / |W|`` of every linear layer, by the base model's module name.

    Of an anchored adapter it is the trained pair's, before its frozen start is subtracted.
    """
    found = {}
    with torch.no_grad():
        for name, layer in adapter_layers(model, adapter_name).items():
            if not is_linear(layer, adapter_name):
                continue
            a, b = (trained_of(f[adapter_name]).detach() for f in (layer.lora_A, layer.lora_B))
            weight = read_weight(layer.get_base_layer(), name)
            found[name] = float(relative_size(Factors(a, b), weight, layer.scaling[adapter_name]))
    return found
