"""Bad input fails here, before any long work, with the layer or file and the remedy in the message."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Mapping

from peft import LoraConfig
from torch import nn

from lorainit.adapters.layers import configurations, true_config
from lorainit.adapters.match_learning_rate import (
    alphas_times,
    check_can_match,
    resized_by,
    scale_alphas,
)
from lorainit.adapters.patterns import with_ranks
from lorainit.adapters.reference import ReferenceWeights
from lorainit.adapters.supported import starts_asked_for
from lorainit.adapters.targets import Target, Targets, converted, match_targets
from lorainit.adapters.weights import fingerprint, fingerprints, same_weight
from lorainit.errors import (
    AdapterError,
    DataError,
    MissingStatisticError,
    RankError,
    StatisticsFileError,
)
from lorainit.parallel import collectives
from lorainit.parallel.sharding import is_sharded
from lorainit.statistics import Statistics
from lorainit.statistics.collect.unreached import NOT_REACHED
from lorainit.statistics.settings import OnUnused
from lorainit.types import GivesBack, LayerStatistics, LimitsRank, Method, ReadsReference
from lorainit.types.numbers import require_number, shown

logger = logging.getLogger("lorainit")


def check_arguments(
    model: nn.Module,
    peft_config: object,
    method: object,
    data: object,
    statistics: object,
    adapter_name: str,
    calibration_share: float,
    precision: str,
    reference_weights: object = None,
    *,
    suggest_rate: bool = False,
    learning_rate: float | None = None,
) -> None:
    """Raise unless the arguments of `get_peft_model` can be worked with."""
    taken = isinstance(adapter_name, str) and hasattr(nn.ModuleDict(), adapter_name)
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name or taken:
        raise AdapterError(
            f"adapter_name {adapter_name!r} cannot name a module: give a text without dots that is no "
            "method of torch.nn.ModuleDict, such as 'default'."
        )
    if peft_config is None:
        if adapter_name not in configurations(model):
            raise AdapterError(
                "peft_config is None, which only an adapter that exists already can be started with. "
                "Pass a peft.LoraConfig."
            )
    elif not isinstance(peft_config, LoraConfig):
        raise AdapterError(
            f"peft_config must be a peft.LoraConfig, not a {type(peft_config).__name__}: lorainit starts "
            "LoRA adapters only."
        )
    if isinstance(method, type) or not isinstance(method, Method):
        name = method.__name__ if isinstance(method, type) else type(method).__name__
        hint = f"{name}()" if isinstance(method, type) else "lorainit.LoraDA()"
        raise AdapterError(
            f"method must be an object with needs and solve, such as {hint}; got {name}."
        )
    if statistics is not None and not isinstance(statistics, Statistics):
        raise StatisticsFileError(
            f"statistics must be a lorainit.Statistics, not a {type(statistics).__name__}; "
            "Statistics.load(path) reads one from a file."
        )
    _check_reference(model, method, reference_weights, has_data=data is not None)
    if suggest_rate and data is None:
        raise MissingStatisticError(
            "suggest_rate=True measures a learning rate on data, which is missing: pass data=..., batches of "
            "the target task, also beside statistics=...."
        )
    if learning_rate is not None:
        require_number("learning_rate", learning_rate, inclusive=False, error=AdapterError)
        check_can_match(model, adapter_name, peft_config)
        if data is None:
            raise MissingStatisticError(
                f"learning_rate={learning_rate:g} is matched by measuring the start's own rate on data, which "
                "is missing: pass data=..., batches of the target task, also beside statistics=...."
            )
    if method.needs and data is None and statistics is None:
        raise MissingStatisticError(
            f"{type(method).__name__} needs {', '.join(sorted(method.needs))}: pass data=..., batches of "
            "the target task, or statistics=..., collected before."
        )
    require_number(
        "calibration_share", calibration_share, inclusive=False, below=1.0, error=DataError
    )
    if precision not in ("fast", "exact"):
        raise AdapterError(f"precision must be 'fast' or 'exact', got {shown(precision)}")
    if isinstance(data, str | bytes | Mapping):
        raise DataError(
            f"data must be an iterable of batches, not a {type(data).__name__}. Give a DataLoader, or a "
            "list of dictionaries."
        )


def check_adapter_exists(model: nn.Module, adapter_name: str) -> None:
    """Raise unless the model has a LoRA adapter of this name."""
    known = configurations(model)
    if not isinstance(known.get(adapter_name), LoraConfig):
        there = ", ".join(f"'{n}'" for n, c in known.items() if isinstance(c, LoraConfig))
        raise AdapterError(
            f"the model has no LoRA adapter '{adapter_name}' to suggest a learning rate for; it has "
            f"{there or 'none'}. Make it first, with lorainit.get_peft_model or PEFT's own."
        )


def _check_reference(
    model: nn.Module, method: Method, reference_weights: object, *, has_data: bool
) -> None:
    """A method that reads full-precision weights gets them, and no other."""
    name = type(method).__name__
    if not isinstance(method, ReadsReference):
        if reference_weights is not None:
            raise AdapterError(
                f"{name} reads no reference_weights: leave them out, or take a method for quantized "
                "bases, such as lorainit.QERA()."
            )
    elif method.needs_reference and reference_weights is None:
        raise MissingStatisticError(
            f"{name} needs the weights that the base was quantized from: pass reference_weights=..., the "
            "folder of the full-precision checkpoint, a mapping, a model, or a function of a layer's name."
        )

    if reference_weights is None or not isinstance(method, GivesBack):
        return
    if not has_data or not method.calibrated:
        raise AdapterError(
            f"{name} measures whether giving back what quantization took pays: pass data=... beside "
            "reference_weights and leave its length at None, or take lorainit.QERA()."
        )
    if is_sharded(model):
        raise AdapterError(
            f"{name} does not read reference_weights of a model whose weights are cut over processes: "
            "take lorainit.QERA()."
        )


def configuration(
    model: nn.Module, peft_config: LoraConfig | None, adapter_name: str, existing: bool
) -> LoraConfig:
    """A copy of the configuration, with PEFT's own initialization schemes switched off."""
    if existing:
        config = true_config(model, adapter_name)
        # It is started at the scaling that it was configured with.
        scale_alphas(config, 1 / alphas_times(resized_by(model, adapter_name)))
        if peft_config is not None and (peft_config.r, peft_config.lora_alpha) != (
            config.r,
            config.lora_alpha,
        ):
            raise AdapterError(
                f"adapter '{adapter_name}' exists with r={config.r}, lora_alpha={config.lora_alpha}; the "
                f"configuration says r={peft_config.r}, lora_alpha={peft_config.lora_alpha}. Give another "
                "adapter_name, or delete_adapter first."
            )
        if peft_config is not None:
            _check_same_targets(model, config, peft_config, adapter_name)
        return config
    assert peft_config is not None
    config = copy.deepcopy(peft_config)
    for name in starts_asked_for(config):
        logger.warning(
            "LoraConfig(%s=%r) is not used: method=... decides the start, and has PEFT's own as well: "
            "lorainit.PiSSA(), lorainit.EVA() and so on",
            name,
            getattr(config, name),
        )
    config.init_lora_weights = True
    converted(model, config)
    return config


def _check_same_targets(
    model: nn.Module, config: LoraConfig, wanted: LoraConfig, adapter_name: str
) -> None:
    """An adapter that exists has its layers already; another set cannot be asked for."""
    have, want = (set(match_targets(model, c).layers) for c in (config, wanted))
    if have != want:
        name = min(have ^ want)
        raise AdapterError(
            f"adapter '{adapter_name}' exists with other target_modules than the configuration's: "
            f"layer '{name}' is {'missing in' if name in want else 'not one of'} "
            f"{'it' if name in want else 'the latter'}. Give another adapter_name, or delete_adapter "
            "first."
        )


def with_possible_ranks(
    model: nn.Module,
    config: LoraConfig,
    targets: Targets,
    method: Method,
    *,
    cap_rank: bool,
    on_small: OnUnused = "raise",
) -> Targets:
    """Ranks above what a layer and the method allow: lowered, capped at the same scaling, or refused.

    Args:
        model: the base model, or a PeftModel.
        config: of the adapter, changed in place by `cap_rank`.
        targets: what it matches.
        method: what is to solve them.
        cap_rank: lower the adapter's own rank in the configuration.
        on_small: ``"default"``: solve such layers at their own rank, in an adapter of the configured one.

    Raises:
        RankError: such a layer, unless either is said; or no layer that could be solved.
    """
    factor = method.rank_factor if isinstance(method, LimitsRank) else 1
    limits = {
        name: min(t.spec.out_features, t.spec.in_features) // factor
        for name, t in targets.layers.items()
        if factor * t.spec.rank > min(t.spec.out_features, t.spec.in_features)
    }
    if not limits:
        return targets
    if not (cap_rank or on_small == "default") or not any(
        limits.get(name, 1) for name in targets.layers
    ):
        name, limit = next(iter(limits.items()))
        target = targets.layers[name]
        divided = f" / {factor}" if factor > 1 else ""
        small = len({targets.layers[n].configured_name for n in limits})
        raise RankError(
            f"layer '{target.configured_name}' has rank {target.spec.rank} in the configuration, above "
            f"its min(out, in){divided} = {limit} ({small} such layers). Lower r, give these layers "
            "a rank_pattern, or pass cap_rank=True."
        )
    if cap_rank:
        ranks = {targets.layers[n].configured_name: max(1, k) for n, k in limits.items()}
        with_ranks(config, ranks, targets.configured_names)
        targets = match_targets(model, config)
    return targets.at_own_ranks(limits)


def check_statistics(
    statistics: Statistics,
    targets: Targets,
    method: Method,
    reference: ReferenceWeights | None = None,
) -> None:
    """The statistics must be of these layers, of this model, and hold what the method reads.

    Of a quantized base they may be of the full-precision model, whose weights are the `reference`.
    """
    unused = set(statistics.metadata.get("unused", ()))
    shares = statistics.shares
    if shares is not None and (shares.rank, shares.size) != collectives.world():
        raise StatisticsFileError(
            f"the statistics are shared out over {shares.size} processes, of which this was "
            f"{shares.rank}; now it is {collectives.world()[0]} of {collectives.world()[1]}. Use them "
            "where they were collected, or save them there and load the file."
        )
    names = set(statistics.names)
    missing = [n for n in targets.layers if n not in names and n not in unused]
    if missing:
        known = next(iter(statistics.names), "none")
        raise StatisticsFileError(
            f"the statistics hold no layer '{missing[0]}' ({len(missing)} of {len(targets.layers)} "
            f"targets are missing; they hold for example '{known}'). They were collected for other "
            "targets or another model: collect them again with this configuration."
        )
    reached = {n: target for n, target in targets.layers.items() if n not in unused}
    # Each process sees its own layers, and all must agree before they gather weights together.
    with contextlib.nullcontext() if shares is None else collectives.shared_errors():
        for name, target in reached.items():
            if name in statistics:
                _check_layer(name, target, statistics[name], method)
    stored = statistics.fingerprints
    modules = {name: target.module for name, target in reached.items() if name in stored}
    for name, found in fingerprints(modules).items():
        if not same_weight(stored[name], found) and not (
            reference is not None
            and same_weight(stored[name], fingerprint(reference.read(targets.layers[name])))
        ):
            raise StatisticsFileError(
                f"layer '{name}' has other weights than the model that the statistics were made for. "
                "Load that model, or collect the statistics again."
            )


def _check_layer(name: str, target: Target, layer: LayerStatistics, method: Method) -> None:
    lacking = method.needs - layer.available
    if lacking:
        raise MissingStatisticError(
            f"{type(method).__name__} needs {', '.join(sorted(lacking))}, which the statistics do not "
            f"hold (layer '{name}'; there is: {', '.join(sorted(layer.available))}). Collect again "
            f"with needs=lorainit.{type(method).__name__}().needs."
        )
    spec = target.spec
    for field, size in (
        ("gradient_sum", (spec.out_features, spec.in_features)),
        ("input_second_moment_sum", (spec.in_features, spec.in_features)),
        ("input_sum", (spec.in_features,)),
        ("input_counts", (spec.in_features,)),
        ("output_second_moment_sum", (spec.out_features, spec.out_features)),
        ("output_second_moment_diagonal_sum", (spec.out_features,)),
    ):
        tensor = getattr(layer, field)
        if tensor is not None and tuple(tensor.shape) != size:
            raise StatisticsFileError(
                f"layer '{name}': {field} has shape {tuple(tensor.shape)}, this model's layer wants "
                f"{size}. The statistics were made for another model."
            )


def unused_targets(statistics: Statistics, targets: Targets) -> dict[str, str]:
    """Targets that have no statistics, with the reason that was found when the others were collected."""
    reasons = statistics.metadata.get("unused_reasons") or {}
    return {
        name: reasons.get(name, NOT_REACHED)
        for name in statistics.metadata.get("unused", ())
        if name in targets.layers
    }
