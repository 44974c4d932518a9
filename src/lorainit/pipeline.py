"""The straight line: targets, statistics, factors, adapter."""

from __future__ import annotations

import contextlib
import copy
import logging
import statistics as stats
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Literal

import peft
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorainit.adapters import install as installing
from lorainit.adapters.patterns import with_ranks
from lorainit.adapters.targets import Target, Targets, match_targets
from lorainit.adapters.weights import fingerprint, read_weight, same_weight
from lorainit.errors import (
    AdapterError,
    DataError,
    LorainitError,
    MissingStatisticError,
    NonFiniteError,
    RankError,
    StatisticsFileError,
)
from lorainit.methods.vanilla import Vanilla
from lorainit.statistics import CollectSettings, LossFunction, Statistics, collect
from lorainit.statistics.collect import input_device
from lorainit.statistics.guard import unchanged_rng, unchanged_rng_on_error
from lorainit.types import (
    Factors,
    LayerSpec,
    LayerStatistics,
    LossReduction,
    Method,
    TokenMask,
    settings_of,
)

logger = logging.getLogger("lorainit")

_CHUNK_BYTES = 1 << 30


def collect_statistics(
    model: nn.Module,
    peft_config: LoraConfig,
    *,
    data: Iterable[Any],
    needs: Iterable[str],
    token_mask: TokenMask = "attention",
    loss_reduction: LossReduction = "sequence",
    max_sequences: int | None = 256,
    loss_fn: LossFunction | None = None,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    on_unused: Literal["raise", "default"] = "raise",
    progress: bool = True,
) -> Statistics:
    """Collect what methods read, in one pass over a few batches of target data.

    Args:
        model: a base model or a PeftModel (of which the base is measured, adapters switched off). It
            is the same afterwards, bit for bit.
        peft_config: says which layers are targets.
        data: any iterable of keyword batches that the model's forward takes, with ``labels``.
        needs: names of the statistics, ``method.needs``; a union of several methods' serves them all.
        token_mask: ``"attention"``: positions that attend count in the second moments; ``"labels"``:
            positions that predict a label (causal language models). The gradient is never masked.
        loss_reduction: ``"sequence"``: each sequence's loss is the mean over its own label tokens;
            ``"token"``: their sum, and the gradient is divided by all label tokens.
        max_sequences: a cap, over all processes together; None for all of `data`.
        loss_fn: ``loss_fn(model, batch)`` to ``(sequences,)`` losses, where the default (cross-entropy
            from the logits; mean squared error for regression) does not fit.
        on_nonfinite: what to do about a batch whose loss is not finite.
        on_unused: what to do about targets that no sequence reached.
        progress: show a progress bar.

    Returns:
        Statistics by module name, in the units of their docstrings.

    Raises:
        TargetError, DataError, NonFiniteError: see each; the model is as it was.
    """
    installing.check_not_merged(model)
    targets = match_targets(model, peft_config)
    settings = CollectSettings(
        needs=frozenset(needs),
        token_mask=token_mask,
        loss_reduction=loss_reduction,
        max_sequences=max_sequences,
        on_nonfinite=on_nonfinite,
        on_unused=on_unused,
        progress=progress,
    )
    return _collect(model, targets, data, settings, loss_fn)


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig | None,
    *,
    method: Method,
    data: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    adapter_name: str = "default",
    token_mask: TokenMask = "attention",
    loss_reduction: LossReduction = "sequence",
    max_sequences: int | None = 256,
    loss_fn: LossFunction | None = None,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    on_unused: Literal["raise", "default"] = "raise",
    cap_rank: bool = False,
    precision: Literal["fast", "exact"] = "fast",
    autocast_adapter_dtype: bool = True,
    progress: bool = True,
) -> PeftModel:
    """An ordinary PeftModel whose adapter starts where the data says it should.

    Args:
        model: a base model; or a PeftModel, which gets a new adapter, or whose adapter of this name
            is started again. No weight of the base is changed by a bit, now or later.
        peft_config: any LoraConfig; it is copied. None for an existing adapter's own.
        method: how to find the start, for example ``lorainit.LoraDA()``.
        data: batches to collect statistics from, see `collect_statistics`.
        statistics: statistics collected before, instead of `data`.
        adapter_name: of the adapter to create or start again.
        token_mask: see `collect_statistics`.
        loss_reduction: see `collect_statistics`.
        max_sequences: see `collect_statistics`.
        loss_fn: see `collect_statistics`.
        on_nonfinite: see `collect_statistics`.
        on_unused: see `collect_statistics`.
        cap_rank: lower the rank of layers that are too small for it, instead of an error.
        precision: ``"fast"``: solve in float32 (float64 where that fails); ``"exact"``: in float64.
        autocast_adapter_dtype: as in PEFT: adapters of half-precision models are kept in float32.
        progress: show progress bars.

    Returns:
        The PeftModel; `model` itself where that was one.

    Raises:
        LorainitError: bad input, found before any long work; the model is as it was.
    """
    _check_arguments(model, peft_config, method, data, statistics, adapter_name)
    installing.check_not_merged(model)
    existing = isinstance(model, PeftModel) and adapter_name in model.peft_config
    config = _configuration(model, peft_config, adapter_name, existing)
    targets = match_targets(model, config)
    targets = _with_possible_ranks(model, config, targets, cap_rank=cap_rank)
    if statistics is not None:
        _check_statistics(statistics, targets, method)
    elif method.needs:
        assert data is not None
        settings = CollectSettings(
            needs=method.needs,
            token_mask=token_mask,
            loss_reduction=loss_reduction,
            max_sequences=max_sequences,
            on_nonfinite=on_nonfinite,
            on_unused=on_unused,
            progress=progress,
        )
        statistics = _collect(model, targets, data, settings, loss_fn)
    plain = isinstance(method, Vanilla) and not existing
    unused = {} if statistics is None else _unused(statistics, targets)
    left_out = targets.left_out | unused
    served = {name: t for name, t in targets.layers.items() if name not in unused}
    with unchanged_rng(input_device(model)):
        solved, sizes = (
            ({}, {})
            if plain
            else solve_layers(served, statistics, method, precision=precision, progress=progress)
        )
    device = input_device(model)
    with unchanged_rng_on_error(device), installing.undone_on_error(model, adapter_name):
        wrapped = _wrap(model, config, adapter_name, existing, autocast_adapter_dtype)
        installing.install(wrapped, adapter_name, solved, _settings_of(method))
    if not plain:
        left_out |= installing.left_at_default(wrapped, adapter_name, solved, left_out)
    logger.info(_summary(method, sizes, left_out))
    return wrapped


def solve_layers(
    targets: Mapping[str, Target],
    statistics: Statistics | None,
    method: Method,
    *,
    precision: Literal["fast", "exact"] = "fast",
    progress: bool = True,
) -> tuple[dict[str, Factors], dict[str, float]]:
    """Factors of every target, and ``|s B A| / |W|`` of each.

    Layers of one shape, rank and scaling are solved together.
    """
    solved: dict[str, Factors] = {}
    sizes: dict[str, float] = {}
    bar = tqdm(
        total=len(targets),
        desc=type(method).__name__,
        unit="layer",
        disable=None if progress else True,
    )
    with bar, torch.no_grad():
        for chunk in _chunks(targets):
            weights = [read_weight(t.module, t.name) for t in chunk]
            layers = [
                LayerStatistics() if statistics is None else statistics[t.name] for t in chunk
            ]
            for target, weight, pair in zip(
                chunk, weights, _solve_chunk(chunk, weights, layers, method, precision), strict=True
            ):
                solved[target.name] = pair
                sizes[target.name] = _relative_size(pair, weight, target.spec.scaling)
            bar.update(len(chunk))
    return {name: solved[name] for name in targets}, sizes


def _solve_chunk(
    chunk: list[Target],
    weights: list[Tensor],
    layers: list[LayerStatistics],
    method: Method,
    precision: Literal["fast", "exact"],
) -> list[Factors]:
    """Solve a stack of layers of one shape; if that fails, one by one, to name the layer."""
    spec = chunk[0].spec
    dtype = torch.float64 if precision == "exact" else None
    moved = [
        _for_solving(layer, method.needs, weight.device, dtype)
        for layer, weight in zip(layers, weights, strict=True)
    ]
    wide = [w.to(dtype) if dtype is not None else w for w in weights]
    if len(chunk) > 1:
        try:
            stacked = method.solve(
                torch.stack(wide), LayerStatistics.stack(moved), spec.rank, spec.scaling
            )
            _check_factors(stacked, spec, (len(chunk),))
            return [stacked[i] for i in range(len(chunk))]
        except (LorainitError, torch.OutOfMemoryError):
            if wide[0].is_cuda:
                torch.cuda.empty_cache()
    return [
        _solve_one(target, weight, layer, method)
        for target, weight, layer in zip(chunk, wide, moved, strict=True)
    ]


def _solve_one(target: Target, weight: Tensor, layer: LayerStatistics, method: Method) -> Factors:
    try:
        pair = method.solve(weight, layer, target.spec.rank, target.spec.scaling)
        _check_factors(pair, target.spec, ())
        return pair
    except LorainitError as error:
        raise type(error)(f"layer '{target.name}': {error}") from error


def _check_factors(pair: Factors, spec: LayerSpec, leading: tuple[int, ...]) -> None:
    """A method of the user's own may return anything."""
    have = tuple(pair.A.shape), tuple(pair.B.shape)
    want = (*leading, spec.rank, spec.in_features), (*leading, spec.out_features, spec.rank)
    if have != want:
        raise AdapterError(
            f"the method gave A, B of shapes {have}; the layer wants {want}. "
            "Correct the method's solve."
        )
    if not bool(torch.isfinite(pair.A).all() and torch.isfinite(pair.B).all()):
        raise NonFiniteError(
            "the method gave factors that are not finite. Look at the statistics, or raise damping."
        )


def _for_solving(
    layer: LayerStatistics, needs: frozenset[str], device: torch.device, dtype: torch.dtype | None
) -> LayerStatistics:
    """Only what the method reads, where the weight lies."""
    return layer.only(needs).to(device=device, dtype=dtype)


def _chunks(targets: Mapping[str, Target]) -> Iterator[list[Target]]:
    """Targets of one shape, rank, scaling and device, as many as fit a chunk."""
    groups: dict[tuple[Any, ...], list[Target]] = {}
    for target in targets.values():
        spec = target.spec
        device = next((p.device for p in target.module.parameters()), None)
        key = (spec.out_features, spec.in_features, spec.rank, spec.scaling, device)
        groups.setdefault(key, []).append(target)
    for (rows, columns, *_), members in groups.items():
        size = 4 * (rows * rows + rows * columns + columns * columns)
        step = max(1, _CHUNK_BYTES // size)
        for first in range(0, len(members), step):
            yield members[first : first + step]


def _relative_size(pair: Factors, weight: Tensor, scaling: float) -> float:
    """``|s B A|_F / |W|_F`` without forming the product."""
    a, b = pair.A.float(), pair.B.float()
    square = ((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0)
    return float(scaling * square.sqrt() / weight.float().norm().clamp_min(1e-30))


# --- checks -----------------------------------------------------------------------------------


def _check_arguments(
    model: nn.Module,
    peft_config: object,
    method: object,
    data: object,
    statistics: object,
    adapter_name: str,
) -> None:
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


def _configuration(
    model: nn.Module, peft_config: LoraConfig | None, adapter_name: str, existing: bool
) -> LoraConfig:
    """A copy of the configuration, with PEFT's own initialization schemes switched off."""
    if existing:
        assert isinstance(model, PeftModel)
        config = installing.true_config(model, adapter_name)
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


def _with_possible_ranks(
    model: nn.Module, config: LoraConfig, targets: Targets, *, cap_rank: bool
) -> Targets:
    """Refuse ranks above ``min(out, in)``, or cap them at the same scaling."""
    limits = {
        name: min(t.spec.out_features, t.spec.in_features)
        for name, t in targets.layers.items()
        if t.spec.rank > min(t.spec.out_features, t.spec.in_features)
    }
    if not limits:
        return targets
    if not cap_rank:
        name, limit = next(iter(limits.items()))
        raise RankError(
            f"layer '{name}' has rank {targets.layers[name].spec.rank} in the configuration, above its "
            f"min(out, in) = {limit} ({len(limits)} such layers). Lower r, give these layers a "
            "rank_pattern, or pass cap_rank=True."
        )
    with_ranks(config, limits, [*targets.layers, *targets.left_out])
    return match_targets(model, config)


def _check_statistics(statistics: Statistics, targets: Targets, method: Method) -> None:
    """The statistics must be of these layers, of this model, and hold what the method reads."""
    unused = set(statistics.metadata.get("unused", ()))
    missing = [n for n in targets.layers if n not in statistics and n not in unused]
    if missing:
        known = next(iter(statistics), "none")
        raise StatisticsFileError(
            f"the statistics hold no layer '{missing[0]}' ({len(missing)} of {len(targets.layers)} "
            f"targets are missing; they hold for example '{known}'). They were collected for other "
            "targets or another model: collect them again with this configuration."
        )
    for name, target in targets.layers.items():
        if name in unused:
            continue
        layer = statistics[name]
        lacking = method.needs - layer.available
        if lacking:
            raise MissingStatisticError(
                f"{type(method).__name__} needs {', '.join(sorted(lacking))}, which the statistics do not "
                f"hold (layer '{name}'; there is: {', '.join(sorted(layer.available))}). Collect again "
                f"with needs=lorainit.{type(method).__name__}().needs."
            )
        _check_layer(name, target, layer, statistics.fingerprints.get(name))


def _check_layer(name: str, target: Target, layer: LayerStatistics, stored: Tensor | None) -> None:
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
    if stored is not None and not same_weight(stored, fingerprint(target.module, name)):
        raise StatisticsFileError(
            f"layer '{name}' has other weights than the model that the statistics were made for. Load "
            "that model, or collect the statistics again."
        )


def _unused(statistics: Statistics, targets: Targets) -> dict[str, str]:
    return {
        name: "no sequence reached it"
        for name in statistics.metadata.get("unused", ())
        if name in targets.layers
    }


# --- PEFT -------------------------------------------------------------------------------------


def _collect(
    model: nn.Module,
    targets: Targets,
    data: Iterable[Any],
    settings: CollectSettings,
    loss_fn: LossFunction | None,
) -> Statistics:
    """Statistics of the base model, adapters switched off, with its fingerprints."""
    off = _adapters_off(model) if isinstance(model, PeftModel) else contextlib.nullcontext()
    modules = {name: target.module for name, target in targets.layers.items()}
    with off:
        found = collect(model, modules, data, settings, loss_fn)
    with torch.no_grad():
        found.fingerprints = {name: fingerprint(modules[name], name) for name in found}
    return found


@contextlib.contextmanager
def _adapters_off(model: PeftModel) -> Iterator[None]:
    """PEFT's own context lets every active adapter learn afterwards, frozen before or not."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _wrap(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    existing: bool,
    autocast_adapter_dtype: bool,
) -> PeftModel:
    """Let PEFT create the adapter's layers."""
    if existing:
        assert isinstance(model, PeftModel)
        return model
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype)
        return model
    wrapped = peft.get_peft_model(
        model, config, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
    )
    assert isinstance(wrapped, PeftModel)
    return wrapped


def _settings_of(method: Method) -> dict[str, object]:
    """A method's name, and its settings where it is a dataclass."""
    return settings_of(method) if is_dataclass(method) else {"method": type(method).__name__}


def _summary(method: Method, sizes: Mapping[str, float], left_out: Mapping[str, str]) -> str:
    """One line: how large the start is, and what was left out and why."""
    line = f"{type(method).__name__}: "
    if sizes:
        line += (
            f"{len(sizes)} layers started, |s B A| / |W| largest {max(sizes.values()):.2g}, "
            f"median {stats.median(sizes.values()):.2g}"
        )
    else:
        line += "PEFT's own start"
    if left_out:
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:4])
        more = f"; and {len(left_out) - 4} more" if len(left_out) > 4 else ""
        line += f". Left at PEFT's start: {shown}{more}"
    return line
