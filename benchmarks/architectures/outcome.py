"""What a record comes to: one of six outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.architectures.numbers import wrong

NOT_ALONE = "does not run by itself"
NOT_WITH_PEFT = "not with stock PEFT"
STARTS = "starts as it is"
REFUSED = "refused in one line"
OWN = "fails for a reason of its own"
WRONG = "wrong number"
FOREIGN = "foreign exception"

OUTCOMES = (NOT_ALONE, NOT_WITH_PEFT, STARTS, REFUSED, OWN, WRONG, FOREIGN)
SAID = "do not lie like the attention mask"
"""The warning that it is not known where padding is."""
_DEPENDS = 1e-4
"""From here on a model's outputs depend on the padding beside them."""


def outcome(record: Mapping[str, Any]) -> str:
    """The outcome of an entry, the worst of its stages'."""
    if record.get("alone") is not True:
        return NOT_ALONE if "harness" not in record else FOREIGN
    if record.get("peft") is not True:
        return NOT_WITH_PEFT if "harness" not in record else FOREIGN
    if "harness" in record or "starts" not in record:
        return FOREIGN
    figures = record["numbers"]
    found = {_of_numbers(figures), *(_of_start(start) for start in record["starts"].values())}
    if batched := figures.get("batched_failure"):
        found.add(_of_start(batched))
    return next(kind for kind in (FOREIGN, WRONG, REFUSED, OWN, STARTS) if kind in found)


def _of_start(found: Mapping[str, Any]) -> str:
    if "error" in found:
        if found["reproduced"]:
            return OWN
        return REFUSED if found["refused"] else FOREIGN
    return WRONG if found.get("faults") else STARTS


def _of_numbers(found: Mapping[str, Any]) -> str:
    if "error" in found:
        return _of_start(found)
    if wrong(found["truth"]):
        return OWN if found.get("chance") or found.get("frozen") else WRONG
    batched = wrong(found.get("batching", {}))
    if not batched:
        return STARTS
    if any(SAID in line for line in found.get("said_of_batches", ())):
        return STARTS
    if "positions" in batched:
        # How many positions there are does not depend on what the model makes of them.
        return WRONG
    return STARTS if found.get("chance") or not found["padding"] < _DEPENDS else WRONG


def reason(record: Mapping[str, Any]) -> str:
    """Why an entry does not start, in a line."""
    for key in ("harness", "alone", "peft"):
        if isinstance(record.get(key), str):
            return str(record[key])
    figures = record.get("numbers", {})
    reasons = []
    for what, found in [
        ("statistics", figures),
        ("batches", figures.get("batched_failure", {})),
        *record.get("starts", {}).items(),
    ]:
        if "error" in found:
            alone = f" [also {found['reproduced']}]" if found["reproduced"] else ""
            reasons.append(f"{what}: {found['error']}{alone}")
        reasons += [f"{what}: {fault}" for fault in found.get("faults", ())]
    if figures.get("frozen"):
        reasons.append("autograd itself gives other gradients when all but linear layers is frozen")
    if figures.get("chance"):
        reasons.append("two runs of the model differ")
    for key in ("truth", "batching"):
        some = figures.get(key, {})
        reasons += [f"{key}: {name} {some[name]}" for name in wrong(some)]
    return "; ".join(reasons)
