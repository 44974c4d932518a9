"""Statistics and losses of chosen modules, below the public functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lorainit.calibration.held_out_loss import HeldOutLoss
from lorainit.data.sampling import draw_sample
from lorainit.statistics import CollectSettings, Statistics
from lorainit.statistics.collection import (
    PlannedCollection,
    collect_layers,
    plan_collection,
)
from lorainit.statistics.settings import Subject

Modules = Mapping[str, nn.Module]


def subject(model: Any, modules: Modules, needs: Iterable[str] = (), **options: Any) -> Subject:
    return Subject(model, modules, frozenset(needs), CollectSettings(progress=False, **options))


def planned(
    model: Any, modules: Modules, data: Any, needs: Iterable[str], **options: Any
) -> PlannedCollection:
    return plan_collection(subject(model, modules, needs, **options), draw_sample(data, None))


def collected(
    model: Any, modules: Modules, data: Any, needs: Iterable[str], **options: Any
) -> Statistics:
    return collect_layers(subject(model, modules, needs, **options), draw_sample(data, None))


def held_out(model: Any, modules: Modules, data: Any, **options: Any) -> HeldOutLoss:
    batches = draw_sample(data, None).batches
    return HeldOutLoss(subject(model, modules, **options), batches)
