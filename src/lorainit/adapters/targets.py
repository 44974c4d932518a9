"""Which layers a LoraConfig targets: PEFT's own matching, on a model that is not changed by it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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

from lorainit.adapters.config_checks import check_config
from lorainit.adapters.supported import check_supported
from lorainit.adapters.unserved import why_left_out
from lorainit.errors import TargetError
from lorainit.models.convolution import convolution_shape
from lorainit.models.experts import ExpertLayer, ExpertStack, expert_parameters
from lorainit.types import LayerSpec


@dataclass(frozen=True, eq=False)
class Target:
    """One layer that can be started from data: a linear layer, a convolution, an embedding, or an expert.

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

    @property
    def is_expert(self) -> bool:
        """Whether it is one of several that PEFT adapts, and gives one rank, as one parameter."""
        return isinstance(self.module, ExpertLayer)

    @property
    def configured_name(self) -> str:
        """The name by which PEFT looks up rank and alpha: an expert's is its parameter's."""
        return self.name.rpartition(".")[0] if self.is_expert else self.name


@dataclass(frozen=True, eq=False)
class Targets:
    """What a configuration matches in a model.

    Attributes:
        layers: by name, in the model's order.
        left_out: matched by the configuration but not served, by name, with the reason. They get
            PEFT's own start.
        filled_up: layers that are solved at a rank below the adapter's, by name, with both ranks in
            words. Rows of ``A`` beyond it are PEFT's, with zero columns of ``B``.
    """

    layers: dict[str, Target]
    left_out: dict[str, str]
    filled_up: dict[str, str] = field(default_factory=dict)

    @property
    def configured_names(self) -> list[str]:
        """Every name by which PEFT looks up rank and alpha, once."""
        names = [target.configured_name for target in self.layers.values()]
        return list(dict.fromkeys([*names, *self.left_out]))

    def at_own_ranks(self, limits: Mapping[str, int]) -> Targets:
        """The same, layers to be solved at most at these ranks; at rank zero they are left out.

        Args:
            limits: by name; others keep their rank.
        """
        layers, left_out, filled_up = {}, dict(self.left_out), dict(self.filled_up)
        for name, target in self.layers.items():
            limit, rank = limits.get(name, target.spec.rank), target.spec.rank
            if limit == 0:
                left_out[name] = "it is too small for the method"
                continue
            if limit < rank:
                target = replace(target, spec=replace(target.spec, rank=limit))
                filled_up[name] = f"{limit} of {rank}"
            layers[name] = target
        return Targets(layers, left_out, filled_up)


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
            ``layers_to_transform``, ``exclude_modules``, patterns for rank and alpha,
            ``target_parameters``, of which each expert is a target, named by its number.

    Raises:
        TargetError: nothing matches, nothing that matches can be served, or experts are to be
            adapted in a way that PEFT has for linear layers only.
        RankError, AdapterError: a number in the configuration that is none, or out of its range; or the
            configuration asks for something that a start does not serve.
    """
    check_config(peft_config)
    check_supported(peft_config)
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
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        _match_parameters(config, name, inner, layers, left_out)
        if not check_target_module_exists(config, name):
            continue
        shape = weight_shape(inner)
        spec = _spec(config, name, shape or (0, 0))
        reason = why_left_out(name, inner, spec.rank)
        if reason is None and shape is None:
            reason = f"{type(inner).__name__} is not a linear layer"
        if reason is not None:
            left_out[name] = reason
            continue
        one_hot = isinstance(inner, nn.Embedding)
        layers[name] = Target(replace(spec, one_hot=one_hot), inner)
    if not layers:
        raise TargetError(_nothing_matched(config, left_out))
    _check_experts(config, layers)
    _check_tied(base, config, layers)
    return Targets(layers, left_out)


def _check_tied(base: nn.Module, config: LoraConfig, layers: dict[str, Target]) -> None:
    """PEFT ties the factors of two tied layers, which a start of one of them would untie."""
    if not getattr(config, "ensure_weight_tying", False):
        return
    holders: dict[int, list[nn.Module]] = {}
    for module in base.modules():
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            holders.setdefault(id(weight), []).append(module)
    for name, target in layers.items():
        shared = holders.get(id(getattr(target.module, "weight", None)), [])
        if len(shared) > 1 and any(isinstance(m, nn.Embedding) for m in shared):
            raise TargetError(
                f"layer '{name}' shares its weight with the embedding, and with ensure_weight_tying=True PEFT "
                "makes their adapters share their factors too, which a start cannot be written into. Leave "
                f"'{name}' out of target_modules, or set ensure_weight_tying=False."
            )


def _match_parameters(
    config: LoraConfig,
    name: str,
    module: nn.Module,
    layers: dict[str, Target],
    left_out: dict[str, str],
) -> None:
    """Add what ``target_parameters`` match in one module, by PEFT's rule: a name, or its end."""
    wanted = getattr(config, "target_parameters", None) or ()
    stack: ExpertStack | None = None
    for parameter, _ in module.named_parameters(recurse=False):
        key = f"{name}.{parameter}"
        if not any(key == w or key.endswith(f".{w}") for w in wanted):
            continue
        if parameter not in expert_parameters(module):
            left_out[key] = f"a parameter of {type(module).__name__}, no linear layer"
            continue
        stack = stack or ExpertStack(module)
        for layer in stack.layers[parameter]:
            spec = _spec(config, key, (layer.out_features, layer.in_features))
            spec = replace(spec, name=f"{key}.{layer.index}")
            layers[spec.name] = Target(spec, layer)


def _check_experts(config: LoraConfig, layers: dict[str, Target]) -> None:
    """What PEFT refuses for parameters is found before any long work."""
    odd = [
        f"{key}={getattr(config, key)!r}"
        for key in ("lora_dropout", "use_dora", "lora_bias")
        if getattr(config, key, False)
    ]
    name = next((n for n, target in layers.items() if target.is_expert), None)
    if odd and name is not None:
        raise TargetError(
            f"'{name}' is an expert in a stacked parameter, which PEFT does not adapt with "
            f"{', '.join(odd)}. Leave that out of the LoraConfig, or the experts out of its targets."
        )


def skipped_experts(model: nn.Module, config: LoraConfig | None, targets: Targets) -> list[str]:
    """Stacked parameters of experts that ``"all-linear"`` passes over, since they are no linear layers."""
    if config is None or config.target_modules != "all-linear":
        return []
    known = {*targets.configured_names}
    return [
        f"{name}.{parameter}"
        for name, module in base_model_of(model).named_modules()
        for parameter in expert_parameters(module)
        if f"{name}.{parameter}" not in known
    ]


def converted(model: nn.Module, config: LoraConfig) -> None:
    """PEFT's own translation of experts' names from before transformers 5, in place.

    ``w1`` of a Mixtral, and ``"all-linear"``, stand for parameters there. PEFT does this when it
    creates the adapter; done again it changes nothing.
    """
    base = base_model_of(model)
    if not hasattr(getattr(base, "config", None), "model_type"):
        return
    try:
        from peft.utils import transformers_weight_conversion as conversion

        mapping = conversion.get_model_conversion_mapping
        convert = conversion.convert_peft_config_for_transformers
    except (ImportError, AttributeError):
        # An older PEFT, or transformers before 5: nothing to translate.
        return
    convert(config, model=base, conversions=mapping(base))


def weight_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(out, in)`` of a linear layer, however it stores its weight; None for anything else.

    Of a convolution that is a linear layer over patches ``in`` is their width; of an embedding it is the
    number of words.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return convolution_shape(module)
    if isinstance(module, Conv1D):
        rows, columns = getattr(module.weight, "ds_shape", module.weight.shape)
        return int(columns), int(rows)
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if isinstance(module, nn.MultiheadAttention | nn.Bilinear):
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
    converted(base, config)
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
