"""One pass over a few batches gives every statistic of every target layer."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorainit.errors import DataError, NonFiniteError, TargetError
from lorainit.linalg import all_finite
from lorainit.statistics import distributed
from lorainit.statistics.accumulators import LayerSums
from lorainit.statistics.batches import (
    batch_rows,
    first_rows,
    is_splittable,
    to_device,
)
from lorainit.statistics.footprint import batch_positions_of, held_bytes, peak_bytes
from lorainit.statistics.guard import measuring, unchanged_rng
from lorainit.statistics.losses import (
    LossFunction,
    batch_loss,
    has_label,
    innermost,
    run_forward,
)
from lorainit.statistics.nonfinite import (
    Glances,
    Numbered,
    cut,
    looks_at_once,
    numbered,
    without_bad,
)
from lorainit.statistics.plan import (
    BatchSize,
    Plan,
    default_budget,
    is_easy,
    make_plan,
    parse_bytes,
    total_bytes,
)
from lorainit.statistics.positions import batch_positions
from lorainit.statistics.reduction import reduce_layers
from lorainit.statistics.rounds import even_rounds, is_sharded, sample, shared_population
from lorainit.statistics.sharing import Shares
from lorainit.statistics.store import Statistics
from lorainit.statistics.taps import TapState, tapped
from lorainit.types import (
    GRADIENT_STATISTICS,
    STATISTICS,
    LayerStatistics,
    LossReduction,
    TokenMask,
)

logger = logging.getLogger("lorainit")

_FP16_LOSS_SCALE = 2.0**12

_ALL_MASKED = (
    "every label is masked: not one that the loss counts differs from -100, so there is no "
    "gradient. "
    "Look at the collator's prompt masking, and at truncation that cuts the answers off."
)


@dataclass(frozen=True)
class CollectSettings:
    """How statistics are collected; see `lorainit.collect_statistics` for each."""

    needs: frozenset[str]
    token_mask: TokenMask = "attention"
    loss_reduction: LossReduction = "sequence"
    max_sequences: int | None = 256
    on_nonfinite: Literal["raise", "skip"] = "raise"
    on_unused: Literal["raise", "default"] = "raise"
    progress: bool = True
    max_memory: int | str | None = None
    gather: bool = True

    def __post_init__(self) -> None:
        if not self.needs:
            raise ValueError(
                "needs is empty, so there is nothing to collect. Pass method.needs, or some of: "
                f"{', '.join(sorted(STATISTICS))}."
            )
        unknown = set(self.needs) - STATISTICS
        if unknown:
            raise ValueError(
                f"unknown statistics in needs: {', '.join(sorted(map(str, unknown)))}. "
                f"There are: {', '.join(sorted(STATISTICS))}."
            )
        for name, choices in (
            ("token_mask", get_args(TokenMask)),
            ("loss_reduction", get_args(LossReduction)),
            ("on_nonfinite", ("raise", "skip")),
            ("on_unused", ("raise", "default")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, got "
                    f"{getattr(self, name)!r}"
                )
        parse_bytes(self.max_memory)
        if self.max_sequences is not None and self.max_sequences < 1:
            raise ValueError(f"max_sequences must be at least 1 or None, got {self.max_sequences}")


def collect(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    data: Iterable[Any],
    settings: CollectSettings,
    loss_fn: LossFunction | None = None,
    *,
    population: float | None = None,
) -> Statistics:
    """Collect the statistics of `modules` (base layers by target name) from `data`.

    `population` is the size of the fine-tuning set, where `data` does not know it.

    Hooks are gone, and ``requires_grad``, modes, ``.grad`` and the random state are as they were,
    when this returns or raises.
    """
    with unchanged_rng(input_device(model)):
        prepared = prepare(model, modules, data, settings, loss_fn, population=population)
        parts = []
        for part in prepared.parts():
            # What is kept of one pass makes room for the next.
            parts.append(part.to("cpu") if len(prepared.plan.passes) > 1 else part)
            del part
    return _merged(parts, modules, settings)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Batches and a plan: everything that can be known before the passes."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    batches: list[dict[str, Any]]
    settings: CollectSettings
    loss_fn: LossFunction | None
    population: float | None
    plan: Plan

    def parts(self) -> Iterator[Statistics]:
        """Each pass's statistics, in the layers' order; a pass begins when its part is asked for."""
        device, rows = input_device(self.model), self.plan.batch.rows
        for group in self.plan.passes:
            some = {name: self.modules[name] for name in group}
            with measuring(self.model):
                run = _run(
                    self.model, some, self.batches, self.settings, self.loss_fn, device, rows
                )
            part = _finish(run, self.settings, self.population, device, len(self.plan.passes) == 1)
            del run
            yield part


def prepare(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    data: Iterable[Any],
    settings: CollectSettings,
    loss_fn: LossFunction | None = None,
    *,
    population: float | None = None,
) -> Prepared:
    """Check the data and plan the passes; the random state may be drawn from."""
    device = input_device(model)
    population = shared_population(data) if population is None else population
    batches = sample(data, settings.max_sequences)
    if loss_fn is None and settings.needs & GRADIENT_STATISTICS:
        _check_labels(model, batches)
    plan = _plan(model, modules, batches, settings, loss_fn, device)
    logger.info(str(plan))
    return Prepared(model, modules, batches, settings, loss_fn, population, plan)


def _plan(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: list[dict[str, Any]],
    settings: CollectSettings,
    loss_fn: LossFunction | None,
    device: torch.device,
) -> Plan:
    """The passes, the same on every process; one row is run to know what a batch takes."""
    found = {name: _shape(module) for name, module in modules.items()}
    shapes = {name: shape or (0, 0) for name, shape in found.items()}
    element = 8 if _dtype(model) == torch.float64 else 4
    needs = settings.needs
    own = parse_bytes(settings.max_memory)
    budget = own if own is not None else default_budget(device)
    held = 0 if budget is None else held_bytes(model, device)
    # The tightest process decides.
    room = [b - h for b, h in distributed.gather_objects((budget or 0, held)) if b]
    if budget is not None and room:
        budget = held + min(room)
    nbytes = total_bytes(shapes, needs, element=element)
    if budget is None or (own is None and is_easy(nbytes, budget, held)) or None in found.values():
        return make_plan(shapes, needs, None, element=element)
    shared, row = _footprint(model, modules, batches, settings, loss_fn, device)
    return make_plan(
        shapes,
        needs,
        budget,
        shared=shared,
        element=element,
        held=held,
        batches=_batch_sizes(batches, row),
        strict=own is not None,
    )


def _footprint(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: list[dict[str, Any]],
    settings: CollectSettings,
    loss_fn: LossFunction | None,
    device: torch.device,
) -> tuple[list[list[str]], float]:
    """Groups of layers that read one input, and the bytes that a position of a batch takes."""
    state = TapState(settings.needs, {name: LayerSums() for name in modules})
    largest = max(batches, key=_row_positions, default=None)
    rows = [] if largest is None else [_one_row(largest)]
    sharded = is_sharded(model)
    rounds = even_rounds(rows, sharded=sharded)
    taken = 0.0

    def forward(inputs: dict[str, Any]) -> Tensor | None:
        """The loss, where a backward pass will follow."""
        if not state.backward:
            with torch.no_grad():
                run_forward(model, inputs, loss_fn)
            return None
        with torch.enable_grad():
            result = batch_loss(model, inputs, settings.loss_reduction, loss_fn)
            return result.per_sequence.sum()

    # Collectives of a sharded model run in the backward, which everyone begins or nobody.
    shared_work = distributed.together if sharded else nullcontext
    own_work = nullcontext if sharded else distributed.together
    with measuring(model), tapped(state, modules, _encoder(model)), own_work():
        for batch, _ in rounds:
            positions = batch_positions(model, batch, settings.token_mask, device)
            state.begin_batch(positions, counted=False)
            inputs = to_device(batch, device)
            with peak_bytes(device) as peak:
                with shared_work():
                    loss = forward(inputs)
                if loss is not None and loss.requires_grad:
                    torch.autograd.backward(loss)
                del loss
                taken = peak() / batch_positions_of(batch)
    groups: dict[int, list[str]] = {}
    for name, sums in state.layers.items():
        groups.setdefault(id(sums.inputs), []).append(name)
    known = [group for group in groups.values() if len(group) > 1]
    both = distributed.gather_objects((known, taken))
    return next((g for g, t in both if t), known), max(t for _, t in both)


def _row_positions(batch: Mapping[str, Any]) -> float:
    return batch_positions_of(batch) / max(1, batch_rows(batch))


def _one_row(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    return first_rows(batch, 1, batch_rows(batch)) if is_splittable(batch) else batch


def _batch_sizes(batches: Sequence[Mapping[str, Any]], position: float) -> list[BatchSize]:
    """The batches as they come, and cut to fewer and fewer rows, where that can be done."""
    whole = max((batch_positions_of(b) for b in batches), default=1)
    row = max((_row_positions(b) for b in batches), default=1.0)
    most = max((batch_rows(b) for b in batches), default=1)
    whole, row, most, apart = (
        max(column)
        for column in zip(
            *distributed.gather_objects(
                (whole, row, most, not all(is_splittable(b) for b in batches))
            ),
            strict=True,
        )
    )
    sizes = [BatchSize(None, whole, int(whole * position))]
    while most > 1 and not apart:
        most = -(-most // 2)
        sizes.append(BatchSize(most, int(most * row), int(most * row * position)))
    return sizes


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """``(out, in)`` as the layer says it, whatever its weight is stored as."""
    for names in (("out_features", "in_features"), ("nf", "nx")):
        out, inner = (getattr(module, name, None) for name in names)
        if isinstance(out, int) and isinstance(inner, int):
            return out, inner
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and hasattr(module, "nf"):
        return weight.shape[1], weight.shape[0]
    return None


def _merged(
    parts: list[Statistics], modules: Mapping[str, nn.Module], settings: CollectSettings
) -> Statistics:
    """The passes' statistics as one, in the targets' order."""
    if len(parts) == 1:
        return parts[0]
    layers = {name: part[name] for part in parts for name in part}
    metadata = dict(parts[0].metadata)
    metadata["unused"] = [name for part in parts for name in part.metadata["unused"]]
    some = [part.shares for part in parts if part.shares is not None]
    owners = {name: owner for shares in some for name, owner in shares.owners.items()}
    check_unused(metadata["unused"], [n for part in parts for n in part.names], settings)
    return Statistics(
        {name: layers[name] for name in modules if name in layers},
        metadata,
        shares=replace(some[0], owners={n: owners[n] for n in modules if n in owners})
        if some
        else None,
    )


def _run(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: list[dict[str, Any]],
    settings: CollectSettings,
    loss_fn: LossFunction | None,
    device: torch.device,
    rows: int | None,
) -> _Run:
    """One pass; once more where inputs that one batch shared are apart in another.

    And where there is no loss to look at, once more without the sequences that are not finite.
    """
    parts = [
        part for index, batch in enumerate(batches) for part in cut(numbered(index, batch), rows)
    ]
    share, dropped = True, 0
    while True:
        with distributed.together():
            run = _pass(model, modules, parts, settings, loss_fn, device, share_inputs=share)
            parts, bad = _without_suspects(parts, run, settings)
        run.skipped += (dropped := dropped + bad)
        if distributed.anywhere(bad > 0):
            continue
        if not share or distributed.everywhere(run.state.sharing_held()):
            _say_unknown(run.state.unknown)
            return run
        logger.info("inputs shared in one batch were not in another; collecting them apart")
        share = False


def _say_unknown(unknown: Mapping[str, tuple[int, ...]]) -> None:
    if unknown:
        name, shape = next(iter(unknown.items()))
        logger.warning(
            "the inputs of %d layer(s) do not lie like the attention mask (first '%s', %s), so all of "
            "their positions are counted, and padding too if it is among them; batches without "
            "padding avoid that",
            len(unknown),
            name,
            shape,
        )


def _without_suspects(
    parts: list[Numbered], run: _Run, settings: CollectSettings
) -> tuple[list[Numbered], int]:
    """After a pass without losses: the batches without rows that spoiled the sums, and how many."""
    finite = [None if rows is None else torch.isfinite(rows) for rows in run.outputs]
    known = [rows.all() for rows in finite if rows is not None]
    if not known or bool(torch.stack(known).all()) or run.state.finite():
        return parts, 0
    left, dropped = [], 0
    for part, rows in zip(parts, finite, strict=True):
        rest: Numbered | None = part
        if rows is not None and not bool(rows.all()):
            rest, count = without_bad(part, rows, settings.on_nonfinite)
            dropped += count
        if rest is not None:
            left.append(rest)
    return left, dropped


def _check_labels(model: nn.Module, batches: list[dict[str, Any]]) -> None:
    """Every batch has labels, and not all of them are masked: known before any long work."""
    with distributed.together():
        labelled = [has_label(model, batch) for batch in batches]
    if not distributed.anywhere(any(labelled)):
        raise DataError(_ALL_MASKED)


@dataclass(eq=False)
class _Run:
    """What one pass left behind."""

    state: TapState
    sequences: float
    label_tokens: float
    skipped: int
    loss_scale: float
    loss: float | None
    outputs: list[Tensor | None]


def _pass(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    parts: list[Numbered],
    settings: CollectSettings,
    loss_fn: LossFunction | None,
    device: torch.device,
    *,
    share_inputs: bool,
    at_once: bool = False,
) -> _Run:
    """Run every batch; `at_once`: look at each loss before its backward.

    Elsewhere the look comes when the device is done with it, and a bad one costs the pass.
    """
    needs = settings.needs
    if "output_second_moment" in needs:
        # The full matrix serves the diagonal too.
        needs = needs - {"output_second_moment_diagonal"}
    state = TapState(needs, {name: LayerSums() for name in modules}, share_inputs)
    scale = _FP16_LOSS_SCALE if _dtype(model) == torch.float16 else 1.0
    sequences: list[Tensor] = []
    tokens: list[Tensor] = []
    losses: list[Tensor] = []
    outputs: list[Tensor | None] = []
    left: list[Numbered] = []
    skipped = 0
    sharded = is_sharded(model)
    glances = None if at_once or sharded or looks_at_once(device) else Glances()
    spoiled: tuple[Numbered, Tensor] | None = None
    bar = tqdm(
        total=sum(part.sequences for part in parts),
        desc="statistics",
        unit="seq",
        disable=None if settings.progress else True,
    )
    with bar, tapped(state, modules, _encoder(model)), _explained(state) as under_way:
        for part in _rounds(parts, left, sharded=sharded):
            batch, rows = part.batch, part.sequences
            under_way[:] = [part]
            state.begin_batch(
                batch_positions(model, batch, settings.token_mask, device), counted=part.counts
            )
            inputs = to_device(batch, device)
            if not state.backward:
                with torch.no_grad(), distributed.together() if sharded else nullcontext():
                    seen = run_forward(model, inputs, loss_fn)
                if part.counts:
                    outputs.append(seen)
                sequences.append(torch.tensor(rows))
                bar.update(rows)
                continue
            with torch.enable_grad():
                # Where the backward is shared work, nobody begins it unless everyone can.
                with distributed.together() if sharded else nullcontext():
                    result = batch_loss(model, inputs, settings.loss_reduction, loss_fn)
                    if loss_fn is not None and part.counts:
                        _check_count(result.per_sequence, part.index, rows, batch_rows(batch))
                    loss = result.per_sequence.sum()
                    finite = not part.counts or glances is not None
                    finite = finite or bool(torch.isfinite(loss.detach()))
                    if not finite:
                        losses_finite = torch.isfinite(result.per_sequence.detach())
                        rest, count = without_bad(part, losses_finite, settings.on_nonfinite)
                        skipped += count
                        bar.update(count)
                        # What is left of it has its turn when all others have had theirs.
                        left += [] if rest is None else [rest]
                    elif not loss.requires_grad:
                        raise TargetError(
                            "the loss does not depend on any target layer: none of the targets "
                            "ran in the forward pass, or the loss was computed under "
                            "torch.no_grad()."
                        )
                state.counts = state.counts and finite
                if finite or sharded:
                    torch.autograd.backward(loss * scale if scale != 1.0 else loss)
            if not state.counts:
                continue
            sequences.append(result.sequences)
            tokens.append(result.label_tokens)
            losses.append(loss.detach())
            bar.update(rows)
            if glances is not None:
                glances.add(part, result.per_sequence)
                if (spoiled := glances.bad()) is not None:
                    break
    if glances is not None and (spoiled := spoiled or glances.bad(wait=True)) is not None:
        if settings.on_nonfinite == "raise":
            without_bad(*spoiled, settings.on_nonfinite)
        logger.info("batch %d has a loss that is not finite: beginning again", spoiled[0].index)
        del state
        return _pass(
            model,
            modules,
            parts,
            settings,
            loss_fn,
            device,
            share_inputs=share_inputs,
            at_once=True,
        )
    return _Run(
        state,
        float(sum(int(n) for n in sequences)),
        float(sum(int(n) for n in tokens)),
        skipped,
        scale,
        float(sum(float(v) for v in losses)) if losses else None,
        outputs,
    )


@contextmanager
def _explained(state: TapState) -> Iterator[list[Numbered]]:
    """Say what there was no memory for, and what to do about it; the list holds the batch."""
    under_way: list[Numbered] = []
    try:
        yield under_way
    except torch.OutOfMemoryError as error:
        part = under_way[0]
        size = sum(t.numel() * t.element_size() for t in state.tensors()) / 2**30
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in _tensors(part.batch).items())
        raise torch.OutOfMemoryError(
            f"out of memory while statistics were taken of batch {part.index} ({shapes}); the sums "
            f"of {len(state.layers)} layers take {size:.3g} GiB of it. Give smaller batches or "
            "shorter sequences (the statistics do not depend on the batches), call "
            "model.gradient_checkpointing_enable() and model.train(), or pass max_memory='20GiB', or "
            "whatever is free, to plan for smaller batches and fewer layers at a time. "
            f"{str(error).splitlines()[0]}"
        ) from error


def _tensors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if isinstance(value, Tensor)}


def _rounds(parts: list[Numbered], left: list[Numbered], *, sharded: bool) -> Iterator[Numbered]:
    """Every batch, then what has come to be `left` of some, as often on every process as it must."""
    while distributed.anywhere(bool(parts)) if sharded else parts:
        batches = even_rounds([part.batch for part in parts], sharded=sharded)
        fillers = [numbered(-1, batch, counts=False) for batch, _ in batches[len(parts) :]]
        yield from [*parts, *fillers]
        parts = list(left)
        left.clear()


def _check_count(losses: Tensor, index: int, sequences: int, rows: int) -> None:
    """A loss function of the user's own might return one loss per token."""
    if losses.shape[0] not in (sequences, rows):
        raise DataError(
            f"loss_fn returned {losses.shape[0]} losses for batch {index}, which has {sequences} "
            "sequences. It must return one loss per sequence: average over each sequence's tokens."
        )


def _finish(
    run: _Run,
    settings: CollectSettings,
    population: float | None,
    device: torch.device,
    whole: bool,
) -> Statistics:
    """Reduce over processes, check, and hand over; `whole`: there is no other pass."""
    state = run.state
    sequences, tokens, skipped = distributed.sum_counts(
        [run.sequences, run.label_tokens, run.skipped]
    )
    if sequences == 0 and skipped:
        raise NonFiniteError(
            f"the loss of every sequence is not finite ({int(skipped)} skipped). Load the model in "
            "bfloat16 or float32, and look at the data."
        )
    if state.backward and tokens == 0:
        raise DataError(_ALL_MASKED)
    owners = reduce_layers(state.layers, device, gather=settings.gather)
    rank, size = distributed.world()
    layers: dict[str, LayerStatistics] = {}
    for name, sums in state.layers.items():
        if name not in owners or not (settings.gather or owners[name] == rank):
            continue
        layers[name] = sums.finish(
            sequences=sequences,
            label_tokens=tokens,
            loss_reduction=settings.loss_reduction,
            loss_scale=run.loss_scale,
            population=population,
        )
    unused = [name for name in state.layers if name not in owners]
    if owners or whole:
        check_unused(unused, owners, settings)
    with distributed.together():
        _check_layers(layers)
    metadata: dict[str, Any] = {
        "needs": sorted(settings.needs),
        "token_mask": settings.token_mask,
        "loss_reduction": settings.loss_reduction,
        "sequences": sequences,
        "label_tokens": tokens,
        "skipped_sequences": skipped,
        "population": population,
        "unused": unused,
    }
    shares = None if settings.gather or size == 1 else Shares(owners, rank, size)
    return Statistics(layers, metadata, shares=shares)


def check_unused(unused: list[str], reached: Collection[str], settings: CollectSettings) -> None:
    """Raise if no layer ran, or if not all did and that is not allowed."""
    if not unused:
        return
    if not reached:
        raise TargetError(
            f"none of the {len(unused)} target layers ran in the forward pass (first: "
            f"'{unused[0]}'). "
            "Check that the batches reach this part of the model."
        )
    if settings.on_unused == "raise":
        shown = ", ".join(f"'{n}'" for n in unused[:5]) + (", ..." if len(unused) > 5 else "")
        raise TargetError(
            f"{len(unused)} target layer(s) never ran, or got no gradient: {shown}. Give data that "
            "reaches them (experts: more sequences, of more kinds), leave them out with "
            "exclude_modules, or pass on_unused='default' to start them as PEFT does."
        )


def _check_layers(layers: Mapping[str, LayerStatistics]) -> None:
    """Name the first layer whose sums are not finite."""
    checked: dict[int, bool] = {}
    for name, layer in layers.items():
        for field in LayerStatistics.TENSORS:
            tensor = getattr(layer, field)
            if tensor is None:
                continue
            key = id(tensor)
            if key not in checked:
                checked[key] = bool(all_finite(tensor))
            if not checked[key]:
                raise NonFiniteError(
                    f"layer '{name}': {field} is not finite. Its activations or gradients "
                    "overflow in "
                    "the model's dtype: load the model in bfloat16 or float32."
                )


def input_device(model: nn.Module) -> torch.device:
    """Where the model wants its inputs: its embedding's device, or its first parameter's."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        embedding = None
    for owner in (embedding, model):
        if isinstance(owner, nn.Module):
            for parameter in owner.parameters():
                if parameter.device.type != "meta":
                    return _where_it_runs(model, parameter)
    return torch.device("cpu")


def _where_it_runs(model: nn.Module, parameter: nn.Parameter) -> torch.device:
    """Weights may wait on the CPU for a device that they are copied to when they are used."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None and mesh.device_type not in ("cpu", parameter.device.type):
        kind = str(mesh.device_type)
        return torch.device(kind, torch.get_device_module(kind).current_device())
    return parameter.device


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model."""
    base = innermost(model)
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return None
    get = getattr(base, "get_encoder", None)
    encoder = get() if callable(get) else None
    return encoder if isinstance(encoder, nn.Module) else None
