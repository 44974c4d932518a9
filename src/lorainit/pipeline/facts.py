"""What must be the same on every process before they compute together."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from typing import Any

import torch
from peft import LoraConfig

from lorainit._version import __version__
from lorainit.adapters.targets import Targets
from lorainit.statistics.settings import CollectSettings
from lorainit.statistics.store.statistics import Statistics
from lorainit.types import Method, settings_of

_OWN = ("progress", "max_memory")
"""Settings that each process may have for itself."""


def facts_of(config: LoraConfig, settings: CollectSettings, targets: Targets) -> dict[str, object]:
    """Versions, the configuration, the settings and the targets, by names for a message."""
    fields = [f.name for f in dataclasses.fields(CollectSettings) if f.name not in _OWN]
    found: dict[str, object] = {
        "versions": {
            "lorainit": __version__,
            "torch": str(torch.__version__),
            **{name: version(name) for name in ("peft", "transformers")},
        },
        "peft_config": {name: _plain(value) for name, value in sorted(config.to_dict().items())},
        "targets": [repr(target.spec) for target in targets.layers.values()],
    }
    return found | {name: _plain(getattr(settings, name)) for name in fields}


def facts_of_start(
    method: Method, statistics: Statistics | None, **arguments: object
) -> dict[str, object]:
    """The method and its settings, the statistics' layers and counts, and other arguments."""
    found: dict[str, object] = {"method": settings_of(method)}
    if statistics is not None:
        own = {} if statistics.shares is not None else dict(statistics)
        counts = {n: [float(getattr(s, c)) for c in s.COUNTS] for n, s in own.items()}
        found["statistics"] = (statistics.names, counts)
    return found | arguments


def _plain(value: Any) -> object:
    """A value whose ``repr`` is the same in every process that has the same value."""
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, dict):
        return {repr(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
