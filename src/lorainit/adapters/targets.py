"""Which layers a LoraConfig targets: PEFT's own matching, on a model that is not changed by it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorainit.errors import TargetError
from lorainit.types import LayerSpec


@dataclass(frozen=True, eq=False)
class Target:
    """One layer that can be started from data.

    Attributes:
        spec: its name, shape, rank and scaling.
        module: the base layer itself, whose weight is read and whose calls are watched.
    """

    spec: LayerSpec
    module: nn.Module

    @property
    def name(self) -> str:
        """Dotted name in the base model."""
        return self.spec.name


@dataclass(frozen=True, eq=False)
class Targets:
    """What a configuration matches in a model.

    Attributes:
        layers: by name, in the model's order.
        left_out: matched by the configuration but not served, by name, with the reason. They get
            PEFT's own start.
    """

    layers: dict[str, Target]
    left_out: dict[str, str]


def base_model_of(model: nn.Module) -> nn.Module:
    """The model under PEFT's wrapper, or the model itself."""
    if isinstance(model, PeftModel):
        base: nn.Module = model.get_base_model()
        return base
    return model


def match_targets(model: nn.Module, peft_config: LoraConfig) -> Targets:
    """Match `peft_config` against `model` as PEFT will, without touching either.

    Args:
        model: a base model, or a PeftModel, of which the base is matched.
        peft_config: any LoraConfig: names, regular expressions, ``"all-linear"``,
            ``layers_to_transform``, ``exclude_modules``, patterns for rank and alpha.

    Raises:
        TargetError: nothing matches, or nothing that matches can be served.
    """
    base = base_model_of(model)
    config = _resolved(base, peft_config)
    layers: dict[str, Target] = {}
    left_out: dict[str, str] = {}
    wrapped: list[str] = []
    for name, module in base.named_modules():
        if not name or any(name.startswith(prefix) for prefix in wrapped):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped.append(name + ".")
        found = check_target_module_exists(config, name)
        if not found:
            continue
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        shape = weight_shape(inner)
        if shape is None:
            left_out[name] = f"{type(inner).__name__} is not a linear layer"
            continue
        spec = _spec(config, name, shape)
        layers[name] = Target(spec, inner)
    for parameter in getattr(config, "target_parameters", None) or ():
        left_out[parameter] = "a parameter, as of fused experts, not a layer"
    if not layers:
        raise TargetError(_nothing_matched(config, left_out))
    return Targets(layers, left_out)


def weight_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(out, in)`` of a linear layer, however it stores its weight; None for anything else."""
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return int(columns), int(rows)
    if isinstance(module, nn.Embedding | nn.MultiheadAttention | nn.Bilinear):
        return None
    out_features, in_features = (
        getattr(module, "out_features", None),
        getattr(module, "in_features", None),
    )
    if isinstance(out_features, int) and isinstance(in_features, int):
        return out_features, in_features
    return None


def _resolved(base: nn.Module, peft_config: LoraConfig) -> LoraConfig:
    """A copy of the configuration with its shorthands spelled out."""
    config = copy.deepcopy(peft_config)
    if config.target_modules is None and not getattr(config, "target_parameters", None):
        model_type = getattr(getattr(base, "config", None), "model_type", None)
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
        if known is None:
            raise TargetError(
                f"the LoraConfig names no target_modules, and PEFT knows no defaults for model "
                "type "
                f"{model_type!r}. Pass target_modules='all-linear', or a list of names."
            )
        config.target_modules = set(known)
    resolved: LoraConfig = _maybe_include_all_linear_layers(config, base)
    return resolved


def _spec(config: LoraConfig, name: str, shape: tuple[int, int]) -> LayerSpec:
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    alpha = config.alpha_pattern.get(
        get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha
    )
    scaling = alpha / rank**0.5 if config.use_rslora else alpha / rank
    return LayerSpec(name, shape[0], shape[1], int(rank), float(scaling))


def _nothing_matched(config: LoraConfig, left_out: dict[str, str]) -> str:
    wanted = config.target_modules
    shown = wanted if isinstance(wanted, str) else ", ".join(sorted(wanted or ())[:6])
    if left_out:
        name, reason = next(iter(left_out.items()))
        return (
            f"target_modules ({shown}) match only layers that cannot be started from data: "
            f"'{name}' "
            f"({reason}). Add linear layers, or use peft.get_peft_model for these."
        )
    return (
        f"target_modules ({shown}) match no module of the model. Use target_modules='all-linear', "
        "or "
        "names from model.named_modules()."
    )
