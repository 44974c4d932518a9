"""Whether a start can still reach the optimizer: before it is made, or written into what it holds."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorainit.adapters.layers import adapter_layers
from lorainit.errors import AdapterError


def optimizer_of(trainer: Any) -> Any:
    """The optimizer that exists already, without accelerate's wrapper; None where there is none."""
    optimizer = getattr(trainer, "optimizer", None)
    return getattr(optimizer, "optimizer", optimizer)


def check_optimizer(trainer: Any, model: nn.Module, adapter_name: str) -> None:
    """Raise where training has begun, or the optimizer holds other parameters than the adapter's.

    A start is written into the adapter's own parameters, so an optimizer that holds these very tensors and
    has not taken a step trains what was started. One that holds copies (DeepSpeed's, FSDP1's flat parameters),
    or the magnitudes of DoRA, which are made anew, would train something else.
    """
    step = int(getattr(trainer.state, "global_step", 0) or 0)
    if step > 0:
        raise AdapterError(
            f"the trainer has taken {step} step(s), or resumes after them: a start comes before the first. "
            "Call start_trainer before train()."
        )
    optimizer = optimizer_of(trainer)
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in _parameters(model, adapter_name):
        if "lora_magnitude_vector" in name or id(parameter) not in held:
            raise AdapterError(
                f"the trainer's optimizer exists already and does not hold '{name}' as a start would write it, "
                "so it would train something else. Call start_trainer between building the trainer and "
                "train(), and let the trainer make its optimizer."
            )


def _parameters(model: nn.Module, adapter_name: str) -> list[tuple[str, nn.Parameter]]:
    """What learns of an adapter, by name."""
    found = []
    for place, layer in adapter_layers(model, adapter_name).items():
        for name, parameter in layer.named_parameters(prefix=place):
            if parameter.requires_grad and f".{adapter_name}" in name and ".lora_" in name:
                found.append((name, parameter))
    return found
