"""Training stacks of adapters: one step is one CUDA graph; eager, and the same, on a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.data.pools import Pool
from benchmarks.quality.training.adapters import Adapters, Base, Start


@dataclass(frozen=True, eq=False)
class Job:
    """One run of a stack.

    Attributes:
        start: the adapter's start.
        learning_rate: the schedule's peak.
        order: ``(steps, batch)`` rows of the training pool.
    """

    start: Start
    learning_rate: float
    order: Tensor


@dataclass
class Outcome:
    """What one run gave.

    Attributes:
        train_loss: of every step's batch, before the step: mean over its label tokens.
        curve: held-out loss (mean over sequences of their mean over label tokens) by step.
        scores: by split: ``(losses, exact)``, one entry a sequence.
        start_scores: the same before the first step, if asked for.
        finite: whether every number above is finite.
        train_seconds: of the whole stack, held-out evaluations left out.
        evaluate_seconds: of the whole stack.
        stack: how many runs shared those seconds.
    """

    train_loss: list[float] = field(default_factory=list)
    curve: dict[int, float] = field(default_factory=dict)
    scores: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    start_scores: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    finite: bool = True
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    stack: int = 1


def schedule(steps: int, warmup: float) -> Tensor:
    """``(steps,)`` factors of the learning rate: linear warmup, then a cosine to zero."""
    rise = math.ceil(warmup * steps)
    at = torch.arange(steps, dtype=torch.float64)
    fall = 0.5 * (1 + torch.cos(math.pi * (at - rise) / max(1, steps - rise)))
    return torch.where(at < rise, (at + 1) / (rise + 1), fall).float()


class StackTrainer:
    """Trains up to `stack` adapters of one shape on one task at once.

    Args:
        base: the frozen model.
        stack: how many adapters its buffers and graphs are made for.
        rank: of the trained half of every adapter.
        anchored: whether the adapters have a frozen half.
        scaling: of all of them.
        resized: whether each has a scaling of its own besides, see ``Adapters``.
        train: pool of training sequences.
        batch_size: sequences a step and adapter.
        max_steps: room in the buffers.
        warmup: see ``Experiment``.
        clip: see ``Experiment``.
        evaluation_rows: sequences that one evaluation forward takes.
        graphs: capture steps as CUDA graphs.
        memory: graph pool that trainers which never run at once may share; None: one of its own.
    """

    def __init__(
        self,
        base: Base,
        *,
        stack: int,
        rank: int,
        anchored: bool,
        scaling: float,
        resized: bool = False,
        train: Pool,
        batch_size: int,
        max_steps: int,
        warmup: float,
        clip: float,
        evaluation_rows: int = 128,
        graphs: bool,
        memory: Any = None,
    ) -> None:
        device = base.device
        self.base, self.stack, self.warmup, self.clip = base, stack, warmup, clip
        self.train = train.to(device)
        self.adapters = Adapters(
            base, stack, rank, anchored=anchored, scaling=scaling, resized=resized
        )
        self.rotation = base.rotation(train.tokens.shape[1])
        self.order = torch.zeros(max_steps, stack, batch_size, dtype=torch.long, device=device)
        self.factors = torch.zeros(max_steps, device=device)
        self.rates = torch.zeros(stack, 1, device=device)
        self.losses = torch.zeros(max_steps, stack, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        slots = train.targets.shape[1]
        rows, length = evaluation_rows, train.tokens.shape[1]
        self.eval_rows = rows
        empty = Pool(
            torch.zeros(rows, length, dtype=torch.long),
            torch.ones(rows, dtype=torch.long),
            torch.zeros(rows, slots, dtype=torch.long),
            torch.zeros(rows, slots, dtype=torch.long),
            torch.ones(rows, slots),
        )
        self.eval_pool = empty.to(device)
        self.eval_losses = torch.zeros(stack, rows, device=device)
        self.eval_exact = torch.zeros(stack, rows, device=device)
        self._train_once: Callable[[], None] = self._train_step
        self._evaluate_once: Callable[[], None] = self._evaluate_rows
        if graphs:
            self._train_once = self._captured(self._train_step, memory)
            self._evaluate_once = self._captured(self._evaluate_rows, memory)
            self.step.zero_()

    # --- one step, all on the device --------------------------------------------------------

    def _train_step(self) -> None:
        rows = self.order.index_select(0, self.step)[0]
        pool, adapters = self.train, self.adapters
        weights = pool.weights[rows]
        with torch.enable_grad():
            losses, _ = self.base.token_losses(
                pool.tokens[rows], pool.positions[rows], pool.targets[rows], adapters, self.rotation
            )
            means = (losses * weights).sum((1, 2)) / weights.sum((1, 2))
            means.sum().backward()
        self.losses.index_copy_(0, self.step, means.detach()[None])
        with torch.no_grad():
            gradient = adapters.gradient
            if adapters.live is not None:
                gradient = gradient * adapters.live.to(gradient.dtype)
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True, dtype=torch.float32)
            scale = (self.clip / (norm + 1e-6)).clamp(max=1.0)
            rate = self.rates * self.factors.index_select(0, self.step)
            self.base.update(
                adapters.weights,
                adapters.compute,
                adapters.gradient,
                adapters.first,
                adapters.second,
                adapters.live,
                scale,
                rate,
                (self.step + 1).float(),
            )
            self.step += 1

    @torch.no_grad()
    def _evaluate_rows(self) -> None:
        pool = self.eval_pool
        shape = (self.stack, *pool.targets.shape)
        tokens = pool.tokens[None].expand(self.stack, -1, -1)
        losses, right = self.base.token_losses(
            tokens, pool.positions.expand(shape), pool.targets.expand(shape), self.adapters,
            self.rotation,
        )  # fmt: skip
        weights = pool.weights
        self.eval_losses.copy_((losses * weights).sum(-1) / weights.sum(-1))
        self.eval_exact.copy_((right | (weights == 0)).all(-1).float())

    def _captured(self, function: Callable[[], None], memory: Any) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step.zero_()
                function()
        torch.cuda.current_stream().wait_stream(stream)
        self.step.zero_()
        graph = torch.cuda.CUDAGraph()
        # What must outlive a replay stands in buffers made before: the pool holds only scratch.
        with torch.cuda.graph(graph, pool=memory):
            function()
        return graph.replay

    # --- whole runs ---------------------------------------------------------------------------

    def load(self, jobs: Sequence[Job]) -> int:
        """Write starts, rates and data of the jobs; returns the number of steps."""
        steps = len(jobs[0].order)
        if any(len(job.order) != steps for job in jobs) or steps > len(self.order):
            raise ValueError("the jobs of a stack have one number of steps, within max_steps")
        if len(jobs) > self.stack:
            raise ValueError(f"{len(jobs)} jobs do not fit into a stack of {self.stack}")
        for index in range(self.stack):
            # Places that no job needs repeat the last one; their results are dropped.
            job = jobs[min(index, len(jobs) - 1)]
            self.adapters.load(index, job.start)
            self.rates[index] = job.learning_rate
            self.order[:steps, index] = job.order.to(self.order.device)
        if steps:
            self.factors[:steps] = schedule(steps, self.warmup).to(self.factors.device)
        self.step.zero_()
        return steps

    def run(
        self,
        jobs: Sequence[Job],
        *,
        curve: Pool | None = None,
        curve_at: Sequence[int] = (),
        scores: dict[str, Pool] | None = None,
        start_scores: dict[str, Pool] | None = None,
    ) -> list[Outcome]:
        """Train the jobs; held-out loss of `curve` at the steps `curve_at`, `scores` at the end."""
        steps = self.load(jobs)
        early = {name: self.evaluate(pool) for name, pool in (start_scores or {}).items()}
        points: dict[int, Tensor] = {}
        training = evaluating = 0.0
        clock = self._clock()
        for step in range(steps + 1):
            if curve is not None and step in curve_at:
                training += self._lap(clock)
                points[step] = self.evaluate(curve)[0].mean(1)
                evaluating += self._lap(clock)
            if step < steps:
                self._train_once()
        training += self._lap(clock)
        late = {name: self.evaluate(pool) for name, pool in (scores or {}).items()}
        evaluating += self._lap(clock)
        losses = self.losses[:steps].cpu()
        outcomes = []
        for index in range(len(jobs)):
            outcome = Outcome(
                train_loss=losses[:, index].tolist(),
                curve={step: float(values[index]) for step, values in points.items()},
                scores={k: (a[index].cpu(), b[index].cpu()) for k, (a, b) in late.items()},
                start_scores={k: (a[index].cpu(), b[index].cpu()) for k, (a, b) in early.items()},
                train_seconds=training,
                evaluate_seconds=evaluating,
                stack=len(jobs),
            )
            numbers = outcome.train_loss + list(outcome.curve.values())
            numbers += [float(v[0].mean()) for v in outcome.scores.values()]
            outcome.finite = all(map(math.isfinite, numbers))
            outcomes.append(outcome)
        return outcomes

    def evaluate(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """Losses and exact matches of every adapter, each ``(E, sequences)``, on the device."""
        losses, exact = [], []
        pool = pool.to(self.base.device)
        for first in range(0, len(pool), self.eval_rows):
            size = min(self.eval_rows, len(pool) - first)
            # A short last chunk leaves old rows behind the new ones; they are cut off below.
            for name in Pool.__dataclass_fields__:
                getattr(self.eval_pool, name)[:size] = getattr(pool, name)[first : first + size]
            self._evaluate_once()
            losses.append(self.eval_losses[:, :size].clone())
            exact.append(self.eval_exact[:, :size].clone())
        return torch.cat(losses, 1), torch.cat(exact, 1)

    def _clock(self) -> list[float]:
        self._synchronize()
        return [time.perf_counter()]

    def _lap(self, clock: list[float]) -> float:
        self._synchronize()
        now = time.perf_counter()
        gone, clock[0] = now - clock[0], now
        return gone

    def _synchronize(self) -> None:
        if self.base.device.type == "cuda":
            torch.cuda.synchronize()
