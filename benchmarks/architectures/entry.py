"""One entry of a mapping, stage by stage: by itself, with stock PEFT, its numbers, four starts."""

from __future__ import annotations

import copy
import logging
import traceback
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

import lorainit
from benchmarks.architectures import numbers, reference, reproduce, starts
from benchmarks.architectures.outcome import outcome
from benchmarks.architectures.reference import Row, logits_of, own_loss
from benchmarks.architectures.tiny.batches import padded
from benchmarks.architectures.tiny.models import build

_LARGEST = 80_000_000
"""Parameters of a model that is tiny."""
_WIDEST = 5200
"""Of a layer: its second moments have the square."""
_NEEDS = ("gradient", "input_second_moment", "output_second_moment")
_IN_A_BATCH = 4


class _Lines(logging.Handler):
    """Warnings of the package."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage()[:300])

    def taken(self) -> list[str]:
        found, self.lines = self.lines, []
        return found


def run_entry(family: str, name: str) -> dict[str, Any]:
    """The entry's record; its outcome is in ``"outcome"``."""
    record: dict[str, Any] = {"family": family, "name": name}
    said = _Lines()
    logger = logging.getLogger("lorainit")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(said)
    try:
        _stages(record, said)
    except Exception as error:
        record["harness"] = _described(error)
    finally:
        logger.removeHandler(said)
        logger.propagate = propagates
    return record | {"outcome": outcome(record)}


def _stages(record: dict[str, Any], said: _Lines) -> None:
    try:
        model, rows = build(record["family"], record["name"])
        _by_itself(model, rows, record)
    except Exception as error:
        record["alone"] = _described(error)
        return
    record["alone"] = True
    try:
        config, record["targets"] = starts.fitting_config(model, rows[0])
        stock = starts.stock(model, rows[0], config)
    except Exception as error:
        record["peft"] = _described(error)
        return
    record["peft"] = True
    batches = [padded(rows[i : i + _IN_A_BATCH]) for i in range(0, len(rows), _IN_A_BATCH)]
    whole = [batch for batch in batches if batch is not None]
    data = whole if len(whole) == len(batches) else rows
    if data is not rows and not _takes(model, data):
        data = rows
    record["batched"] = data is not rows
    _numbers(model, config, rows, data, record, said)
    record["starts"] = {}
    logits, before = logits_of(model, rows[0]), starts.base_parameters(model)
    for method, make in starts.METHODS.items():
        some = copy.deepcopy(model)
        found: dict[str, Any] = {}
        try:
            adapted = starts.start(some, config, make(), data)
            found["faults"] = list(starts.faults(adapted, before, logits, rows[0], stock))
        except Exception as error:
            found |= _failure(model, config, rows, data, error)
        found["said"] = said.taken()
        record["starts"][method] = found


def _by_itself(model: nn.Module, rows: list[Row], record: dict[str, Any]) -> None:
    record["class"] = type(model).__name__
    record["parameters"] = sum(p.numel() for p in model.parameters())
    record["keys"] = {key: list(value.shape) for key, value in rows[0].items()}
    if record["parameters"] > _LARGEST:
        raise ValueError(f"not tiny: {record['parameters']} parameters")
    widest = max((max(p.shape) for p in model.parameters() if p.dim() == 2), default=0)
    if any(m.weight.shape[0] > _WIDEST for m in model.modules() if isinstance(m, nn.Linear)):
        raise ValueError(f"not tiny: a layer of width {widest}")
    for row in rows:
        loss = own_loss(model, row)
        if not bool(torch.isfinite(loss)):
            raise ValueError("its loss is not finite")
        loss.backward()
    model.zero_grad(set_to_none=True)


def _takes(model: nn.Module, data: list[Row]) -> bool:
    """Whether the model itself runs on padded batches."""
    try:
        for batch in data:
            with torch.no_grad():
                model(**batch)
    except Exception:
        return False
    return True


def _numbers(
    model: nn.Module,
    config: LoraConfig,
    rows: list[Row],
    data: list[Row],
    record: dict[str, Any],
    said: _Lines,
) -> None:
    """Collected statistics beside autograd, and of batches beside those of rows."""

    def collected(some: list[Row]) -> lorainit.Statistics:
        copied = [dict(batch) for batch in some]
        return lorainit.collect_statistics(model, config, data=copied, needs=_NEEDS, progress=False)

    found: dict[str, Any] = {}
    record["numbers"] = found
    try:
        alone = collected(rows)
    except Exception as error:
        found |= _failure(model, config, rows, rows, error)
        said.taken()
        return
    found["said"] = said.taken()
    unused = list(alone.metadata.get("unused", []))
    found["unused"] = {n: alone.metadata["unused_reasons"].get(n) for n in unused[:8]}
    other = copy.deepcopy(model)
    # Nothing is learned by an adapter past whose layer the weight is read.
    past = {n for n in unused if "read directly" in alone.metadata["unused_reasons"].get(n, "")}
    truth = reference.reference(other, rows, [*alone, *(n for n in unused if n not in past)])
    found["truth"] = numbers.against_truth(alone, truth)
    if numbers.wrong(found["truth"]):
        found["chance"] = reproduce.depends_on_chance(model, rows[0])
        found["frozen"] = reproduce.depends_on_what_is_frozen(model, rows[0])
    if data is rows:
        return
    try:
        fixed = reference.reads_no_data(model, rows[0], alone)
        found["reads_no_data"] = sorted(fixed)[:4]
        read = {name: alone[name] for name in alone if name not in fixed}
        found["batching"] = numbers.against_each_other(collected(data), read)
    except Exception as error:
        found["batched_failure"] = _failure(model, config, rows, data, error)
    found["said_of_batches"] = said.taken()
    if numbers.wrong(found.get("batching", {})):
        found["padding"] = max(
            reproduce.depends_on_padding(model, rows[i : i + len(rows) // len(data)], batch)
            for i, batch in zip(range(0, len(rows), len(rows) // len(data)), data, strict=True)
        )
        found.setdefault("chance", reproduce.depends_on_chance(model, rows[0]))


def _failure(
    model: nn.Module, config: LoraConfig, rows: list[Row], data: list[Row], error: Exception
) -> dict[str, Any]:
    """What was raised, whether it is the package's own line, and whether the model does it alone."""
    found: dict[str, Any] = {"error": _described(error)}
    refusal = isinstance(error, lorainit.errors.LorainitError) and "\n" not in str(error)
    found["refused"] = refusal
    found["reproduced"] = reproduce.reproduced(model, config, rows, data, error)
    if isinstance(error, lorainit.errors.NonFiniteError):
        finite = reproduce.gradients_are_finite(model, rows)
        found["reproduced"] = None if finite else "a gradient of its own loss is not finite"
    return found


def _described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in frames]
    own = [
        f"{f.filename.rpartition('/')[2]}:{f.lineno}"
        for f in frames
        if "/lorainit/" in f.filename and "/benchmarks/" not in f.filename
    ]
    where = " < ".join(dict.fromkeys([places[-1], *own[-1:]])) if places else ""
    return f"{type(error).__name__}: {str(error)[:600]} @ {where}"
