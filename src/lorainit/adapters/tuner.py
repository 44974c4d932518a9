"""PEFT's LoRA tuner, for models that hold an anchored adapter: what PEFT itself cannot know about them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lorainit.adapters.anchor import AnchoredFactor
from lorainit.adapters.anchored_kinds import Side, give_anchor
from lorainit.adapters.origin import StartedLoraConfig
from lorainit.errors import AdapterError

_FACTOR_BY_FACTOR = ("ties", "dare_ties", "dare_linear", "magnitude_prune")


class LoraModel(lora.LoraModel):  # type: ignore[misc]
    """PEFT's, with three differences, all about anchored adapters.

    It has the name of PEFT's own, which ``peft.get_model_status`` and others go by.
    """

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter; one made from an anchored adapter's configuration starts as that one did.

        TRL's trainers make such an adapter, and copy every parameter of the first into it, to have a
        reference that does not learn.
        """
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        origin = config.origin if isinstance(config, StartedLoraConfig) else None
        if origin is None or not origin.anchored:
            return
        for name, other in self.peft_config.items():
            if name != adapter_name and getattr(other, "origin", None) is origin:
                _start_alike(model, name, adapter_name)
                return
        # An adapter of another model: this one holds no anchor, and shall not be saved as if it did.
        self.peft_config[adapter_name] = config = copy.copy(config)
        config.origin = None

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As PEFT's, which combines an anchored adapter exactly, but for what prunes factor by factor.

        Raises:
            AdapterError: a combination that would prune an anchored adapter's start apart from what is
                to take it away again.
        """
        parameters = [
            self.peft_config[n].target_parameters for n in adapters if n in self.peft_config
        ]
        # PEFT combines no adapters of parameters, and says so itself.
        if combination_type in _FACTOR_BY_FACTOR and len(adapters) > 1 and not any(parameters):
            for name in adapters:
                if _is_anchored(self.model, name):
                    raise AdapterError(
                        f"combination_type='{combination_type}' prunes every factor by itself, and so the "
                        f"frozen start of the anchored adapter '{name}' too, which would no longer be "
                        f"taken away. Use '{combination_type}_svd', which prunes the change of the weight."
                    )
        super().add_weighted_adapter(
            adapters, weights, adapter_name, combination_type, *args, **kwargs
        )

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self,
        combination_type: str,
        adapters: list[str],
        weights: list[float],
        new_rank: int,
        target: LoraLayer,
        target_lora_A: Tensor,
        target_lora_B: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """As PEFT's, also for a rank above the layer's own, as twice an adapter's rank may be.

        Returns:
            ``A`` and ``B`` of `new_rank`, of which those above the layer's own are zero.
        """
        rank = min(new_rank, target_lora_A[0].numel(), len(target_lora_B))
        a, b = super()._svd_generalized_task_arithmetic_weighted_adapter(
            combination_type,
            adapters,
            weights,
            rank,
            target,
            target_lora_A[:rank],
            target_lora_B[:, :rank],
            *args,
            **kwargs,
        )
        rows = a.new_zeros(new_rank - rank, *a.shape[1:])
        columns = b.new_zeros(len(b), new_rank - rank, *b.shape[2:])
        return torch.cat([a, rows]), torch.cat([b, columns], dim=1)


def know_anchors(model: nn.Module) -> None:
    """Make a PeftModel's tuner one that knows anchored adapters, in place."""
    tuner = getattr(model, "base_model", None)
    if type(tuner) is lora.LoraModel:
        tuner.__class__ = LoraModel


def _is_anchored(model: nn.Module, adapter_name: str) -> bool:
    return any(
        isinstance(module, LoraLayer)
        and adapter_name in module.lora_A
        and isinstance(module.lora_A[adapter_name], AnchoredFactor)
        for module in model.modules()
    )


def _start_alike(model: nn.Module, first: str, second: str) -> None:
    """Give the adapter `second`, of rank ``2 r`` so far, the anchor of `first`, and its start."""
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or first not in layer.lora_A:
            continue
        sides: tuple[tuple[Side, Any], ...] = (("A", layer.lora_A), ("B", layer.lora_B))
        for side, holder in sides:
            old, new = holder[first], holder[second]
            if not isinstance(old, AnchoredFactor):
                continue
            flag, like = new.weight.requires_grad, new.weight
            start = old.anchor if side == "A" else -old.anchor
            give_anchor(new, side, old.anchor.detach().clone(), experts=old.experts)
            start = start.detach().clone().to(device=like.device, dtype=like.dtype)
            new.weight = nn.Parameter(start, flag)
            new.is_copy = True
