"""One step of layers of one shape: from statistics to a displacement of a length and a rank."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorainit.adapters.targets import Target
from lorainit.linalg.low_rank_sum import LowRankSum
from lorainit.solve.ownership import after_out_of_memory
from lorainit.statistics import Statistics
from lorainit.types import LayerStatistics, TakesSteps

Pairs = dict[str, tuple[Tensor, Tensor]]
"""``left`` ``(out, rank)`` and ``right`` ``(rank, in)`` by layer."""


@dataclass(frozen=True, eq=False)
class StepStack:
    """Layers of one shape and rank: their newest step and where it begins, stacked.

    Attributes:
        targets: the layers.
        step: one ``Delta``, strongest directions first.
        whole: the displacement so far and the step together; None at the base.
        limits: ``(layers,)``, the largest ``|s B A|_F`` of each.
    """

    targets: list[Target]
    step: tuple[Tensor, Tensor]
    whole: LowRankSum | None
    limits: Tensor

    @classmethod
    def measured(
        cls,
        method: TakesSteps,
        targets: list[Target],
        statistics: Statistics,
        present: Pairs,
        norms: Mapping[str, float],
        device: torch.device,
    ) -> StepStack:
        """The step from statistics taken at the present displacement."""
        layers = [statistics[t.name].only(method.needs).to(device=device) for t in targets]
        found = method.step(LayerStatistics.stack(layers), targets[0].spec.rank)
        step = found.left, found.right
        limits = step[0].new_tensor([method.trust_region * norms[t.name] for t in targets])
        if not present:
            return cls(targets, step, None, limits)
        left, right = (torch.stack([present[t.name][i] for t in targets]) for i in (0, 1))
        left, right = left.to(step[0]), right.to(step[1])
        both = torch.cat([left, step[0]], dim=-1), torch.cat([right, step[1]], dim=-2)
        return cls(targets, step, LowRankSum.in_metric(found.metric, *both), limits)

    @classmethod
    def all_measured(
        cls,
        method: TakesSteps,
        targets: list[Target],
        statistics: Statistics,
        present: Pairs,
        norms: Mapping[str, float],
        device: torch.device | None = None,
    ) -> list[StepStack]:
        """The same, of fewer layers at once where memory does not do for all."""
        if device is None:
            device = next(targets[0].module.parameters()).device
            if device.type == "meta":
                # The weight is offloaded; the statistics are where they were collected.
                device = statistics[targets[0].name].device or torch.device("cpu")
        try:
            return [cls.measured(method, targets, statistics, present, norms, device)]
        except torch.OutOfMemoryError:
            # Handled below: until here the traceback holds what was allocated.
            pass
        parts, device = after_out_of_memory(targets, device)
        return [
            stack
            for part in parts
            for stack in cls.all_measured(method, part, statistics, present, norms, device)
        ]

    def moved(self, length: float, directions: int) -> tuple[Tensor, Tensor]:
        """The displacement after a step of this length along its first directions, cut to rank.

        A layer that would move out of its trust region is scaled back to its edge.
        """
        left, right = self.step
        used = torch.arange(left.shape[-1], device=left.device) < directions
        weights = (used * length).to(left)
        if self.whole is None:
            left = left * weights
        else:
            weights = torch.cat([torch.ones_like(weights), weights])
            left, right = self.whole.cut(weights, self.targets[0].spec.rank)
        square = ((left.mT @ left) * (right @ right.mT)).sum((-1, -2)).clamp_min(0)
        tiny = torch.finfo(left.dtype).tiny
        scale = (self.limits / square.sqrt().clamp_min(tiny)).clamp(max=1.0)
        return left * scale[:, None, None], right

    def factors(
        self, method: TakesSteps, statistics: Statistics, length: float, directions: int
    ) -> tuple[Tensor, Tensor]:
        """The same as ``s B`` and ``A`` of the adapter."""
        pairs = []
        for target, left, right in zip(self.targets, *self.moved(length, directions), strict=True):
            scaling = target.spec.scaling
            seed = torch.initial_seed() ^ zlib.crc32(target.name.encode())
            a, b = method.factors(left, right, scaling, statistics[target.name], seed)
            pairs.append((scaling * b, a))
        return torch.stack([b for b, _ in pairs]), torch.stack([a for _, a in pairs])
