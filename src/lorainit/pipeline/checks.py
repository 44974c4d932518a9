"""Bad input fails here, before any long work, with the layer or file and the remedy in the message."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Mapping

from peft import LoraConfig, PeftModel
from torch import nn

from lorainit.adapters.layers import true_config
from lorainit.adapters.patterns import with_ranks
from lorainit.adapters.targets import Target, Targets, converted, match_targets
from lorainit.adapters.weights import fingerprints, same_weight
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
from lorainit.types import GivesBack, LayerStatistics, LimitsRank, Method, ReadsReference

UNUSED = "no sequence reached it"
"""Why a target may keep PEFT's start."""

logger = logging.getLogger("lorainit")


def check_arguments(
    model: nn.Module,
    peft_config: object,
    method: object,
    data: object,
    statistics: object,
    adapter_name: str,
    reference_weights: object = None,
) -> None:
    """Raise unless the arguments of `get_peft_model` can be worked with."""
    taken = isinstance(adapter_name, str) and hasattr(nn.ModuleDict(), adapter_name)
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name or taken:
        raise AdapterError(
            f"adapter_name {adapter_name!r} cannot name a module: give a text without dots that is no "
            "method of torch.nn.ModuleDict, such as 'default'."
        )
    if peft_config is None:
        if not (isinstance(model, PeftModel) and adapter_name in model.peft_config):
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
    if method.needs and data is None and statistics is None:
        raise MissingStatisticError(
            f"{type(method).__name__} needs {', '.join(sorted(method.needs))}: pass data=..., batches of "
            "the target task, or statistics=..., collected before."
        )
    if isinstance(data, str | bytes | Mapping):
        raise DataError(
            f"data must be an iterable of batches, not a {type(data).__name__}. Give a DataLoader, or a "
            "list of dictionaries."
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
            f"{name} measures how much of what quantization took it gives back: pass data=... beside "
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
        assert isinstance(model, PeftModel)
        config = true_config(model, adapter_name)
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
    if config.init_lora_weights is not True:
        logger.info(
            "init_lora_weights=%r is not used: the method decides the start",
            config.init_lora_weights,
        )
        config.init_lora_weights = True
    converted(model, config)
    return config


def _check_same_targets(
    model: PeftModel, config: LoraConfig, wanted: LoraConfig, adapter_name: str
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
    model: nn.Module, config: LoraConfig, targets: Targets, method: Method, *, cap_rank: bool
) -> Targets:
    """Refuse ranks above what the layer and the method allow, or cap them at the same scaling."""
    factor = method.rank_factor if isinstance(method, LimitsRank) else 1
    ranks = {t.configured_name: t.spec.rank for t in targets.layers.values()}
    limits = {
        t.configured_name: min(t.spec.out_features, t.spec.in_features) // factor
        for t in targets.layers.values()
        if factor * t.spec.rank > min(t.spec.out_features, t.spec.in_features)
    }
    if not limits:
        return targets
    if not cap_rank:
        name, limit = next(iter(limits.items()))
        divided = f" / {factor}" if factor > 1 else ""
        raise RankError(
            f"layer '{name}' has rank {ranks[name]} in the configuration, above its "
            f"min(out, in){divided} = {limit} ({len(limits)} such layers). Lower r, give these layers "
            "a rank_pattern, or pass cap_rank=True."
        )
    with_ranks(config, limits, targets.configured_names)
    return match_targets(model, config)


def check_statistics(statistics: Statistics, targets: Targets, method: Method) -> None:
    """The statistics must be of these layers, of this model, and hold what the method reads."""
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
        if not same_weight(stored[name], found):
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
    """Targets that no sequence reached when the statistics were collected, with that reason."""
    return {
        name: UNUSED for name in statistics.metadata.get("unused", ()) if name in targets.layers
    }
