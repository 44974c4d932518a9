"""Low-rank steps, each from statistics at the point that the one before led to.

The one loop of the package that goes back: collect, solve, measure, and collect again at the
displaced point. Nothing is installed while it runs; the displacement lives in hooks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lorainit.adapters.targets import Target
from lorainit.calibration.held_out_loss import DisplacedLoss, HeldOutLoss
from lorainit.calibration.line_search import SearchResult, clear_result, search_length
from lorainit.calibration.paired import SequenceLosses, clearest, gain
from lorainit.calibration.sizes import FIRST_SIZE, length_for, relative_sizes, weight_norms
from lorainit.calibration.step_stack import Pairs, StepStack
from lorainit.models.displacement import LowRank
from lorainit.parallel import collectives
from lorainit.parallel.exchange import Slot, broadcast_from_owners
from lorainit.solve.ownership import device_of, layer_owners
from lorainit.solve.stacks import stack_bytes, stacks_of
from lorainit.statistics import Statistics
from lorainit.types import Factors, ForgetsStatistics, TakesSteps

logger = logging.getLogger("lorainit")


@dataclass(eq=False)
class RepeatedSteps:
    """Steps of a method over all layers, one after the other.

    Many processes divide the layers: each takes the steps of its own, and all know the displacement
    of all layers.

    Attributes:
        method: its settings.
        targets: by name.
        searches: one a step.
        directions: how many the newest step used.
    """

    method: TakesSteps
    targets: Mapping[str, Target]
    searches: list[SearchResult] = field(default_factory=list)
    directions: int | None = None
    _at: Pairs = field(default_factory=dict)
    _stacks: list[StepStack] = field(default_factory=list)
    _owners: Mapping[str, int] = field(default_factory=dict)
    _norms: Mapping[str, float] = field(default_factory=dict)
    _reached: Mapping[str, Target] = field(default_factory=dict)

    def present(self) -> dict[str, LowRank]:
        """The displacement so far."""
        return {n: LowRank(left.float(), right.float()) for n, (left, right) in self._at.items()}

    def take(self, statistics: Statistics, held_out: HeldOutLoss) -> SearchResult:
        """One step from statistics taken at the present displacement; `held_out` measures its length."""
        # Layers that none of this step's sequences reached stay where they are.
        known = set(statistics.names)
        self._reached = {name: t for name, t in self.targets.items() if name in known}
        self._owners = layer_owners(self._reached, statistics)
        limits, groups = self._limits(), self._own_stacks(statistics, None)
        with collectives.shared_errors():
            self._stacks = [
                stack
                for members in groups
                for stack in StepStack.all_measured(
                    self.method, members, statistics, self._at, limits
                )
            ]
        return self._measured(held_out, statistics)

    def take_by_parts(
        self, parts: Iterable[Statistics], held_out: HeldOutLoss, max_memory: int | None = None
    ) -> SearchResult:
        """The first step, from statistics that come part by part: each is forgotten before the next.

        Layers in none of the parts are no targets any more.

        Args:
            parts: of layers' statistics, each layer in one of them, taken at the base.
            held_out: measures the step's length.
            max_memory: what everything on a device may take, in bytes; None: what is free.
        """
        method = self.method
        assert isinstance(method, ForgetsStatistics)
        limits = self._limits()
        stacks: list[StepStack] = []
        owners: dict[str, int] = {}
        for part in parts:
            known = set(part.names)
            self._reached = {name: t for name, t in self.targets.items() if name in known}
            self._owners = layer_owners(self._reached, part)
            owners |= self._owners
            groups = self._own_stacks(part, max_memory)
            with collectives.shared_errors():
                stacks += [
                    stack.forgetting(method, part, [0, *self._counts()])
                    for members in groups
                    for stack in StepStack.all_measured(method, members, part, {}, limits)
                ]
            del part
        self._stacks, self._owners = stacks, owners
        self._reached = self.targets = {n: t for n, t in self.targets.items() if n in owners}
        return self._measured(held_out, None)

    def _limits(self) -> dict[str, float]:
        """The largest ``|s B A|_F`` of each layer."""
        self._norms = self._norms or weight_norms(self.targets)
        return {name: self.method.trust_region * norm for name, norm in self._norms.items()}

    def _counts(self) -> list[int]:
        """Numbers of directions that a step may use."""
        largest = max(target.spec.rank for target in self.targets.values())
        return sorted({min(2**i, largest) for i in range(largest.bit_length() + 1)})

    def _measured(self, held_out: HeldOutLoss, statistics: Statistics | None) -> SearchResult:
        """Measure the step that was solved, and take it."""
        with held_out.measuring() as loss:
            result, directions = self._search(loss)
        if result.length > 0 or not self.searches:
            # Where not one length helps the model starts where it is.
            directions = directions if result.length > 0 else 0
            self._at = self._pairs(
                lambda s: s.factors(self.method, statistics, result.length, directions),
                torch.float64,
            )
        self.searches.append(result)
        self._stacks = []
        return result

    def factors(self) -> dict[str, Factors]:
        """The displacement as the adapter's factors."""
        return {
            name: Factors(
                self._at[name][1].float(),
                (self._at[name][0] / target.spec.scaling).float(),
                anchored=False,
            )
            for name, target in self.targets.items()
        }

    def go_back(self) -> None:
        """No step after all: the directions are kept."""
        self._at = {n: (torch.zeros_like(left), right) for n, (left, right) in self._at.items()}

    def _own_stacks(self, statistics: Statistics, max_memory: int | None) -> list[list[Target]]:
        """This process's layers, as many together as are solved at once; every process has to call this."""
        size = stack_bytes(self._reached, self.method, max_memory)
        rank = collectives.world()[0]
        own = {name: t for name, t in self._reached.items() if self._owners[name] == rank}
        return list(stacks_of(own, size, self.method.needs, statistics))

    def _pairs(
        self,
        placed: Callable[[StepStack], tuple[Tensor, Tensor]],
        dtype: torch.dtype,
        width: int | None = None,
    ) -> Pairs:
        """What `placed` gives for each stack, by layer, of all processes' layers.

        Its pairs have the layer's rank, or `width` where that is given.
        """
        own: dict[Any, Tensor] = {}
        with collectives.shared_errors():
            for stack in self._stacks:
                left, right = (half.to(dtype).contiguous() for half in placed(stack))
                for i, target in enumerate(stack.targets):
                    own[target.name, "left"], own[target.name, "right"] = left[i], right[i]
        slots = []
        for name, target in self._reached.items():
            spec, owner = target.spec, self._owners[name]
            rank = spec.rank if width is None else min(width, spec.rank)
            slots.append(Slot((name, "left"), owner, (spec.out_features, rank), dtype))
            slots.append(Slot((name, "right"), owner, (rank, spec.in_features), dtype))
        device = device_of(next(iter(self.targets.values())))
        broadcast_from_owners(own, slots, device)
        moved = {name: (own[name, "left"], own[name, "right"]) for name in self._reached}
        stayed = {n: p for n, p in self._at.items() if n not in moved} if width is None else {}
        return moved | {n: (left.to(dtype), right.to(dtype)) for n, (left, right) in stayed.items()}

    def _terms(
        self, placed: Callable[[StepStack], tuple[Tensor, Tensor]], width: int | None = None
    ) -> dict[str, LowRank]:
        return {n: LowRank(*p) for n, p in self._pairs(placed, torch.float32, width).items()}

    def _search(self, loss: DisplacedLoss) -> tuple[SearchResult, int]:
        """Length, and how many directions to use: as many as before, then more or fewer near by.

        What is taken lowers the loss clearly over the sequences, see `clear_result`. Where there are many,
        some are compared on, and what is taken is measured on all.
        """
        counts = self._counts()
        base = loss(self.present())
        of_all, before_all = loss, loss.latest
        loss = of_all.of_some(base)
        before, measured = loss.latest, list[SequenceLosses]()
        trials: list[tuple[float, float]] = []
        used: list[int] = []
        best = (0.0, base, self.directions or counts[min(1, len(counts) - 1)])

        def better(length: float, directions: int) -> bool:
            """Measure; keep it if it is the best so far."""
            nonlocal best
            value = loss(self._moved(length, directions))
            trials.append((length, value))
            used.append(directions)
            measured.append(loss.latest)
            if not (math.isfinite(value) and value < best[1]):
                return False
            best = (length, value, directions)
            return True

        def at_length(length: float) -> float:
            better(length, begin)
            return trials[-1][1]

        begin = best[2]
        # A later step's length is near the one before: a narrower scan will do.
        later = bool(self.searches)
        search_length(
            at_length,
            self._first_length(begin),
            # A bracket as wide as one factor of the scan: it is refined below.
            precision=3.5,
            max_trials=14,
            start_loss=base,
            scan=1 if later else 2,
        )
        place = counts.index(begin)
        for way in (counts[place + 1 :], counts[:place][::-1]):
            for directions in way if best[0] > 0 else ():
                length = best[0]
                # More directions make a longer step of the same length, fewer a shorter one.
                shorter = length * (best[2] / directions) ** 0.5
                if not (better(shorter, directions) or better(length, directions)):
                    break
            if best[2] != begin:
                break
        if best[0] > 0:
            # The length was looked for coarsely, and perhaps with other directions.
            length, directions = best[0], best[2]
            longer = better(length * 2**0.5, directions)
            better(length * (2 if longer else 0.5**0.5), directions)
        result = SearchResult(best[0], best[1], base, tuple(trials))
        if loss is of_all or result.length == 0:
            result, taken = clear_result(result, before, measured)
            self.directions = best[2] if taken is None else used[taken]
            return result, self.directions
        first = trials.index((result.length, result.loss))
        shorter = clearest(before, measured, first)[0]
        for place in dict.fromkeys((first, first if shorter is None else shorter)):
            length, directions = trials[place][0], used[place]
            of_all(self._moved(length, directions))
            found = replace(result, length=length).on(gain(before_all, of_all.latest))
            if found.length > 0:
                break
        self.directions = directions
        return found, directions

    def _moved(self, length: float, directions: int) -> dict[str, LowRank]:
        """The displacement after a step of this length along so many directions."""
        return self._terms(lambda s: s.moved(length, directions))

    def _first_length(self, directions: int) -> float:
        if self.searches and self.searches[-1].length > 0:
            return self.searches[-1].length / 2
        unit = self._terms(
            lambda s: (s.step[0][..., :directions], s.step[1][..., :directions, :]), directions
        )
        return length_for(relative_sizes(unit, self._norms), FIRST_SIZE)
