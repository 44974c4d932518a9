"""Why a layer has no statistics: no sequence reached it, or what did left no trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from lorainit.data.batch import Batch
from lorainit.data.even_rounds import even_rounds
from lorainit.parallel import collectives
from lorainit.parallel.sharding import is_sharded
from lorainit.statistics.collect.hooks import HookState
from lorainit.statistics.loss.batch_loss import run_forward
from lorainit.statistics.settings import Subject

NOT_REACHED = "no sequence reached it"
WITHOUT_GRADIENT = "it ran without gradient"


def unreached_reasons(
    names: Sequence[str], state: HookState, subject: Subject, batches: Sequence[Batch]
) -> dict[str, str]:
    """Why each layer has no statistics, the same on every process.

    Args:
        names: of these layers, the same on every process.
        state: knows which were called on this process, and which it could not tell sequence by sequence.
        subject: the model, frozen and in eval mode, and its layers.
        batches: one row is run once more, to see who reads the weight of a layer that is never called.
    """
    if not names:
        return {}
    called = {name for some in collectives.gather_objects(sorted(state.ran)) for name in some}
    silent = {
        name: module
        for name, module in subject.modules.items()
        if name in names and name not in called and "weight" in module._parameters
    }
    readers = _readers(silent, subject, batches) if silent else {}
    found = {}
    for name in names:
        found[name] = WITHOUT_GRADIENT if name in called else NOT_REACHED
        if name in readers:
            found[name] = f"its weight is read directly by {readers[name]}"
    for some in collectives.gather_objects(dict(state.apart)):
        found |= {name: why for name, why in some.items() if name in found}
    return found


def _readers(
    modules: Mapping[str, nn.Module], subject: Subject, batches: Sequence[Batch]
) -> dict[str, str]:
    """The class that reads a layer's weight past the layer, by the layer's name."""
    sharded = is_sharded(subject.model)
    rounds = even_rounds([batch.first_row() for batch in batches[:1]], sharded=sharded)
    seen: dict[str, str] = {}
    work = collectives.shared_errors if sharded else nullcontext
    with _watched(modules, seen), torch.no_grad():
        for batch in rounds:
            with work():
                inputs = batch.to(subject.device).content
                run_forward(subject.model, inputs, subject.settings.loss_fn)
    return {n: kind for some in collectives.gather_objects(seen) for n, kind in some.items()}


class _Watched(dict[str, Any]):
    """A module's parameters; notes the first module that reads its weight."""

    def __init__(self, module: nn.Module, name: str, seen: dict[str, str]) -> None:
        super().__init__(module._parameters)
        self.module, self.name, self.seen = module, name, seen

    def __getitem__(self, key: str) -> Any:
        if key == "weight" and self.name not in self.seen:
            frame = sys._getframe(1)
            while frame is not None:
                reader = frame.f_locals.get("self")
                if isinstance(reader, nn.Module) and reader is not self.module:
                    self.seen[self.name] = type(reader).__name__
                    break
                frame = frame.f_back  # type: ignore[assignment]
        return super().__getitem__(key)


@contextmanager
def _watched(modules: Mapping[str, nn.Module], seen: dict[str, str]) -> Iterator[None]:
    own = [(module, module._parameters) for module in modules.values()]
    for name, module in modules.items():
        module._parameters = _Watched(module, name, seen)
    try:
        yield
    finally:
        for module, parameters in own:
            # What shards a model exchanges parameters in a forward.
            now = dict(module._parameters)
            parameters.clear()
            parameters.update(now)
            module._parameters = parameters
