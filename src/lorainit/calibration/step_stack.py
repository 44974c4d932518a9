"""One step of layers of one shape: from statistics to a displacement of a length and a rank."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from lorainit.adapters.targets import Target
from lorainit.linalg.low_rank_sum import LowRankSum
from lorainit.solve.ownership import after_out_of_memory
from lorainit.solve.stacks import together
from lorainit.solve.words import of_words, widened, words_of
from lorainit.statistics import Statistics
from lorainit.types import (
    ForgetsStatistics,
    LayerStatistics,
    RowEnergies,
    TakesSteps,
)

Pairs = dict[str, tuple[Tensor, Tensor]]
"""``left`` ``(out, rank)`` and ``right`` ``(rank, in)`` by layer."""


Solved = TypeVar("Solved")


@dataclass(frozen=True, eq=False)
class StepStack:
    """Layers of one shape and rank: their newest step and where it begins, stacked.

    Attributes:
        targets: the layers.
        step: one ``Delta``, strongest directions first.
        whole: the displacement so far and the step together; None at the base.
        limits: ``(layers,)``, the largest ``|s B A|_F`` of each.
        energies: by the number of directions that a step may use; None: statistics are kept.
        words: of an embedding, those that `step` and `whole` are of; None: all inputs.
    """

    targets: list[Target]
    step: tuple[Tensor, Tensor]
    whole: LowRankSum | None
    limits: Tensor
    energies: Mapping[int, RowEnergies] | None = None
    words: Tensor | None = None

    @classmethod
    def measured(
        cls,
        method: TakesSteps,
        targets: list[Target],
        statistics: Statistics,
        present: Pairs,
        limits: Mapping[str, float],
        device: torch.device,
    ) -> StepStack:
        """The step from statistics taken at the present displacement."""
        # An embedding stands alone.
        first = targets[0]
        there = present[first.name][1] if present else None
        known = statistics[first.name].only(method.needs)
        words = words_of(first, known, first.spec.rank, there)
        layers = [of_words(statistics[t.name], words) for t in targets]
        stack, sharing = together(layers, method.needs, device)
        found = method.step(stack, first.spec.rank)
        del stack
        step = _in_a_row(found.left, sharing), _in_a_row(found.right, sharing)
        bounds = step[0].new_tensor([limits[t.name] for t in targets])
        if not present:
            return cls(targets, step, None, bounds, words=words)
        left, right = (torch.stack([present[t.name][i] for t in targets]) for i in (0, 1))
        left, right = left.to(step[0]), right.to(step[1])
        if words is not None:
            right = right.index_select(-1, words.to(right.device))
        both = torch.cat([left, step[0]], dim=-1), torch.cat([right, step[1]], dim=-2)
        grouped = (
            half if sharing == 1 else half.reshape(-1, sharing, *half.shape[1:]) for half in both
        )
        terms = LowRankSum.in_metric(found.metric, *grouped)
        whole = LowRankSum(*(_in_a_row(tensor, sharing) for tensor in vars(terms).values()))
        return cls(targets, step, whole, bounds, words=words)

    @classmethod
    def all_measured(
        cls,
        method: TakesSteps,
        targets: list[Target],
        statistics: Statistics,
        present: Pairs,
        limits: Mapping[str, float],
    ) -> list[StepStack]:
        """The same, of fewer layers at once where memory does not do for all."""

        def solve(part: list[Target], device: torch.device) -> list[StepStack]:
            return [cls.measured(method, part, statistics, present, limits, device)]

        return _in_parts(solve, targets, _solving_device(targets[0], statistics))

    def forgetting(
        self, method: ForgetsStatistics, statistics: Statistics, counts: Sequence[int]
    ) -> StepStack:
        """The same, from here on without statistics; at the base.

        Args:
            method: its settings.
            statistics: that the step was taken from.
            counts: numbers of directions that may be used.
        """
        assert self.whole is None
        left, right = self.step
        ranks = torch.tensor(counts, device=left.device).reshape(-1, 1, 1, 1)
        used = torch.arange(left.shape[-1], device=left.device) < ranks
        together = _stacked(self.targets, statistics, method.needs, left.device, self.words)
        # All numbers of directions at once.
        energies = method.row_energies(
            left * used, right.expand(len(counts), *right.shape), together
        )
        return replace(self, energies=dict(zip(counts, energies.by_displacement(), strict=True)))

    def moved(self, length: float, directions: int) -> tuple[Tensor, Tensor]:
        """The displacement after a step of this length along its first directions, cut to rank.

        A layer that would move out of its trust region is scaled back to its edge.
        """
        left, right = self._moved(length, directions)
        return left, widened(right, self.words, self.targets[0].spec.in_features)

    def _moved(self, length: float, directions: int) -> tuple[Tensor, Tensor]:
        """The same of the words that are known, where these are an embedding's."""
        left, right = self.step
        used = torch.arange(left.shape[-1], device=left.device) < directions
        weights = (used * length).to(left)
        if self.whole is None:
            left = left * weights
        else:
            weights = torch.cat([torch.ones_like(weights), weights])
            left, right = self.whole.cut(weights, self.targets[0].spec.rank)
        return left * self._scale(left, right).unsqueeze(-1), right

    def _scale(self, left: Tensor, right: Tensor) -> Tensor:
        """``(layers, 1)``: what takes each layer back to the edge of its trust region, at most 1."""
        square = ((left.mT @ left) * (right @ right.mT)).sum((-1, -2)).clamp_min(0)
        tiny = torch.finfo(left.dtype).tiny
        return (self.limits / square.sqrt().clamp_min(tiny)).clamp(max=1.0).unsqueeze(-1)

    def _stretches(self, length: float, directions: int) -> Tensor:
        """``(layers, 1)``: how many times as long a displacement is as its step at length one."""
        left, right = self.step
        used = (torch.arange(left.shape[-1], device=left.device) < directions).to(left)
        return length * self._scale(left * (used * length), right)

    def factors(
        self,
        method: TakesSteps,
        statistics: Statistics | None,
        length: float,
        directions: int,
    ) -> tuple[Tensor, Tensor]:
        """The same as ``s B`` and ``A`` of the adapter; without statistics where they were forgotten."""
        left, right = self._moved(length, directions)
        spec = self.targets[0].spec
        seeds = [torch.initial_seed() ^ zlib.crc32(t.name.encode()) for t in self.targets]
        if self.energies is not None:
            assert isinstance(method, ForgetsStatistics)
            stretches = self._stretches(length, directions)
            energies = self.energies[directions]
            a, b = method.factors_from(left, right, spec.scaling, energies, stretches, seeds)
        else:
            assert statistics is not None
            together = _stacked(self.targets, statistics, method.needs, left.device, self.words)
            a, b = method.factors(left, right, spec.scaling, together, seeds)
        return spec.scaling * b, widened(a, self.words, spec.in_features)


def _stacked(
    targets: list[Target],
    statistics: Statistics,
    needs: frozenset[str],
    device: torch.device,
    words: Tensor | None,
) -> LayerStatistics:
    """What a method needs of these layers, in one place; of an embedding that of these words."""
    layers = [statistics[t.name].only(needs).to(device=device) for t in targets]
    return LayerStatistics.stack([of_words(layer, words) for layer in layers])


def _in_a_row(stack: Tensor, sharing: int) -> Tensor:
    """One leading dimension for all layers, where those that share an input stand in groups."""
    return stack if sharing == 1 else stack.flatten(0, 1)


def _solving_device(target: Target, statistics: Statistics) -> torch.device:
    device = next(target.module.parameters()).device
    if device.type != "meta":
        return device
    # The weight is offloaded; the statistics are where they were collected.
    return statistics[target.name].device or torch.device("cpu")


def _in_parts(
    solve: Callable[[list[Target], torch.device], list[Solved]],
    targets: list[Target],
    device: torch.device,
) -> list[Solved]:
    """What `solve` gives for all targets, or for parts of them where memory does not do."""
    try:
        return solve(targets, device)
    except torch.OutOfMemoryError:
        # Handled below: until here the traceback holds what was allocated.
        pass
    parts, device = after_out_of_memory(targets, device)
    return [one for part in parts for one in _in_parts(solve, part, device)]
