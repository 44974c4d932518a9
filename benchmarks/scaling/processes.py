"""A process's place among the others, its share of the data, its copy of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import lorainit
from benchmarks.common.clock import Clock
from benchmarks.common.decoder import SHAPES, batches_of, build, config
from benchmarks.scaling.cases import Case
from lorainit.methods import LoraDA


class Machine(Clock):
    """This process's device, its place among the others, and a clock that all of them stop."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def wait(self) -> None:
        """Wait until the device has nothing left to do, on every process."""
        self.drain()
        dist.barrier()
        self.drain()

    def drain(self) -> None:
        """The same on this process alone."""
        super().wait()

    @contextmanager
    def peak(self, name: str, peaks: dict[str, list[float]]) -> Iterator[None]:
        """Largest memory of each card, GiB."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        peaks[name] = self.gathered(torch.cuda.max_memory_allocated(self.device) / 2**30)

    def gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def model_of(case: Case, machine: Machine) -> nn.Module:
    """The same random weights on every card, then sharded where the case says so."""
    model = build(SHAPES[case.shape], machine.device)
    if case.kind == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def data_of(case: Case, machine: Machine) -> list[dict[str, Tensor]]:
    """This process's batches: every so-manieth of those that one process would see."""
    return batches_of(case.whole())[machine.rank :: machine.world]


def collected(case: Case, model: nn.Module, data: list[dict[str, Tensor]]) -> lorainit.Statistics:
    return lorainit.collect_statistics(
        model, config(case.whole()), data=data, needs=LoraDA.needs, gather=False, progress=False
    )
