"""Methods' solves, and their angle to the solution in float64."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common.clock import cleared
from benchmarks.common.subspaces import sine_between
from benchmarks.studies.solver.harness import Study
from benchmarks.studies.solver.statistics import count
from lorainit import linalg
from lorainit.linalg import leading
from lorainit.methods import EVA, CorDA, FILet, LoraDA, LoraGA, Natural
from lorainit.types import LayerStatistics


def solved(
    study: Study,
    stacked: dict[str, LayerStatistics],
    layers: int,
    work: Callable[[LayerStatistics, bool], Tensor],
    truth: dict[str, Tensor],
    exact: bool,
) -> dict[str, Any]:
    """Seconds for the model by stack, and the angle to the truth."""
    found: dict[str, Any] = {"seconds": 0.0, "stacks": {}}
    for name, stack in stacked.items():
        work(stack, exact)
        study.wait()
        begin = time.perf_counter()
        basis = work(stack, exact)
        study.wait()
        times = count(stack, name, layers)
        seconds = (time.perf_counter() - begin) * times
        found["seconds"] += seconds
        entry: dict[str, Any] = {"seconds": round(seconds, 3)}
        if name in truth:
            entry["sine"] = sine_between(truth[name].double(), basis.double())
        else:
            truth[name] = basis
        found["stacks"][name] = entry
        cleared()
    found["seconds"] = round(found["seconds"], 3)
    return found


def solving(method: Any, rank: int) -> Any:
    """A method's own solve; gives the basis of its input subspace."""

    def work(stack: LayerStatistics, exact: bool) -> Tensor:
        read = stack.to(dtype=torch.float64) if exact else stack
        second = read.input_second_moment if "input_second_moment" in method.needs else None
        if "gradient" in method.needs:
            weight = torch.zeros_like(read.gradient)
        else:
            assert second is not None
            rows = (
                read.output_second_moment.shape[-1]
                if "output_second_moment" in method.needs
                else min(second.shape[-1], 4096)
            )
            torch.manual_seed(0)
            weight = torch.randn(*second.shape[:-2], rows, second.shape[-1], device=second.device)
            weight = (weight * 0.02).to(second.dtype)
        return method.solve(weight, read, rank, 4.0).A.mT

    return work


def study_solves(
    study: Study, label: str, layers: int, made: Callable[[frozenset[str]], Any]
) -> None:
    for method in (LoraDA(), Natural(), LoraGA(), CorDA(), EVA(), FILet())[: 6 if layers else 3]:
        stacked = made(method.needs)
        truth: dict[str, Tensor] = {}
        for exact in (True, False):

            def work(
                exact: bool = exact,
                method: Any = method,
                stacked: Any = stacked,
                truth: dict[str, Tensor] = truth,
            ) -> dict[str, Any]:
                return solved(study, stacked, layers, solving(method, study.rank), truth, exact)

            name = f"{label}: {type(method).__name__}, {'float64' if exact else 'as it is'}"
            study.run(name, work)
        del stacked
        cleared()


@contextlib.contextmanager
def without_dense(limit: int) -> Iterator[None]:
    """Large dense decompositions, which follow where an iteration fails, are an error here."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError("a dense decomposition was asked for")

    eigh = linalg.eigh
    with (
        mock.patch.object(leading, "lapack_svd", refuse),
        mock.patch.object(leading, "gram_svd", refuse),
        mock.patch.object(leading, "eigh", lambda m: refuse() if m.shape[-1] > limit else eigh(m)),
    ):
        yield
