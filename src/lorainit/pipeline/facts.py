"""What must be the same on every process before they compute together."""

from __future__ import annotations

import dataclasses
import hashlib
from importlib.metadata import version
from typing import Any

import torch
from peft import LoraConfig

from lorainit._version import __version__
from lorainit.adapters.targets import Targets
from lorainit.statistics.settings import CollectSettings
from lorainit.statistics.store.statistics import Statistics
from lorainit.types import LayerStatistics, Method, settings_of

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
    """The method and its settings, the statistics' layers, counts and values, and other arguments."""
    found: dict[str, object] = {"method": settings_of(method)}
    if statistics is not None:
        own = {} if statistics.shares is not None else dict(statistics)
        counts = {n: [float(getattr(s, c)) for c in s.COUNTS] for n, s in own.items()}
        values = {n: _digest(s) for n, s in own.items()}
        found["statistics"] = (statistics.names, counts, values)
    return found | arguments


_READ = 64
"""Numbers of a tensor that are compared."""


def _digest(statistics: LayerStatistics) -> str:
    """A hash of numbers drawn evenly from every tensor of a layer."""
    digest = hashlib.blake2b(digest_size=8)
    for field in dataclasses.fields(statistics):
        value = getattr(statistics, field.name)
        if isinstance(value, torch.Tensor):
            flat = value.detach().reshape(-1)
            read = flat[:: max(1, flat.numel() // _READ)].cpu()
            digest.update(f"{field.name} {tuple(value.shape)} {read.tolist()}".encode())
    return digest.hexdigest()


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
