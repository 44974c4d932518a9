"""How far a start moves every layer."""

from __future__ import annotations

import torch
from peft import PeftModel

from lorainit.adapters.layers import adapter_layers, matrices
from lorainit.adapters.weights import read_weight
from lorainit.solve.layers import relative_size
from lorainit.types import Factors


def sizes_of(model: PeftModel, adapter_name: str = "default") -> dict[str, float]:
    """``|s B A| / |W|`` of every layer with a plain pair, by the base model's module name.

    Of an anchored adapter it is the trained pair's, before its frozen start is subtracted.
    """
    found = {}
    with torch.no_grad():
        for name, layer in adapter_layers(model, adapter_name).items():
            pair = matrices(layer, adapter_name, trained=True)
            if pair is None:
                continue
            weight = read_weight(layer.get_base_layer(), name)
            found[name] = float(relative_size(Factors(*pair), weight, layer.scaling[adapter_name]))
    return found
