"""Letting PEFT create an adapter's layers, at its own start."""

from __future__ import annotations

from typing import Any

import peft
from peft import LoraConfig, PeftModel
from torch import nn


def create_adapter(
    model: nn.Module, config: LoraConfig, adapter_name: str, *, autocast: bool
) -> PeftModel:
    """A PeftModel with a new adapter.

    Args:
        model: a base model or a PeftModel, which gets one more.
        config: of the adapter.
        adapter_name: of the adapter.
        autocast: keep the adapters of half-precision layers in float32.
    """
    if not isinstance(model, PeftModel):
        return peft.get_peft_model(
            model, config, adapter_name=adapter_name, autocast_adapter_dtype=autocast
        )
    # PEFT before 0.19 always casts here, and has no such argument.
    casting: dict[str, Any] = {} if autocast else {"autocast_adapter_dtype": False}
    model.add_adapter(adapter_name, config, **casting)
    return model
