"""Raising at call sites of an operation, and what must hold afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorainit.files.aside import is_aside
from tests.faults.call_sites import Injected, InjectedInterrupt, Site, calls, raising
from tests.faults.operations import Operation
from tests.faults.states import content_of, differences, left_aside, state_of


@dataclass(frozen=True)
class Fault:
    """An exception at one call of one site.

    Attributes:
        operation: its name.
        site: file and line.
        number: which call of the site.
        of: calls of the site in a whole run.
        error: the exception's class.
    """

    operation: str
    site: Site
    number: int
    of: int
    error: type[BaseException]

    @property
    def key(self) -> str:
        """The same in every process and every run of one version of the package."""
        return f"{self.operation} | {self.site[0]}:{self.site[1]} | call {self.number} of {self.of}"


class Disturbed:
    """One operation that is disturbed again and again, in a folder of its own.

    Attributes:
        sites: how often a whole run passes each call site.
    """

    def __init__(self, name: str, operation: Operation, place: Path) -> None:
        self.name, self.operation, self.place = name, operation, place
        before = state_of(operation.model)
        # What is imported by the first run, and made once, is no call of the next ones.
        self._work()
        self._settle(before)
        # A second run writes over the first: what is there afterwards is what must stay.
        self.sites = calls(self._work)
        self._settle(before)
        self.content = content_of(place)

    def faults(self, seed: int) -> Iterator[Fault]:
        """At the first, the last and a random call of every site; a third of them an interrupt."""
        for site, count in sorted(self.sites.items()):
            draw = random.Random(f"{seed} {self.name} {site}")
            for number in sorted({1, count, draw.randint(1, count)}):
                error = Injected if draw.random() < 0.7 else InjectedInterrupt
                yield Fault(self.name, site, number, count, error)

    def inject(self, fault: Fault) -> list[str] | None:
        """What is not as it was after the fault; None where nothing was raised.

        Nothing comes out where an optional part may fail, or where the call was not reached again.
        """
        before = state_of(self.operation.model)
        caught = raising(self._work, fault.site, fault.number, fault.error)
        if caught is None:
            self._settle(before)
            return None
        changed = differences(before, state_of(self.operation.model))
        broken = [name for name in changed if name not in self.operation.ignored]
        found = content_of(self.place)
        broken += [n for n in {**found, **self.content} if found.get(n) != self.content.get(n)]
        if isinstance(caught, Injected):
            # What an interrupt leaves aside goes at the next save.
            broken += left_aside(self.place)
        if broken:
            for path in self.place.rglob("*"):
                if is_aside(path.name):
                    path.unlink()
            self._settle(before)
            self._work()
            self._settle(before)
        return broken

    def _work(self) -> None:
        self.operation.work(self.operation.model, self.place)

    def _settle(self, state: dict[str, Any]) -> None:
        """Bring the model back after a success, or after what was found broken."""
        model = self.operation.model
        self.operation.undo(model)
        if isinstance(model, nn.Module):
            with torch.no_grad():
                for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                    kept = state.get("tensor " + name)
                    if kept is not None and kept[0].shape == tensor.shape:
                        tensor.copy_(kept[0])
                        tensor.requires_grad_(kept[1])
        torch.set_rng_state(state["rng"])
        random.setstate(state["python"])


@dataclass
class Tally:
    """What was injected, and what did not hold."""

    injected: int = 0
    passed_over: int = 0
    broken: list[str] = field(default_factory=list)


def disturb(name: str, operation: Operation, place: Path, *, most: int, seed: int = 0) -> Tally:
    """Faults at `most` call sites of an operation, drawn at random."""
    disturbed = Disturbed(name, operation, place)
    sites = sorted(disturbed.sites)
    drawn = set(random.Random(seed).sample(sites, min(most, len(sites))))
    tally = Tally()
    for fault in disturbed.faults(seed):
        if fault.site not in drawn:
            continue
        broken = disturbed.inject(fault)
        if broken is None:
            tally.passed_over += 1
            continue
        tally.injected += 1
        if broken:
            tally.broken.append(f"{fault.key} ({fault.error.__name__}): {broken[:3]}")
    return tally
