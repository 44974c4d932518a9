"""Ways to solve, beside one another: which arithmetic, how wide a block, where the time is.

    python -m benchmarks.solver_study --out study.jsonl          7B shapes on CUDA, about 100 s
    python -m benchmarks.solver_study --shape tiny               the same at tiny size on a CPU

Statistics are collected from a few decoder layers with random weights (flat spectra, the hard case), and
made up with falling spectra. Seconds are for the whole model, from the layers that are solved times
their number. Errors are sines of the largest angle between subspaces, against float64.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lorainit.linalg.halves import Halves, multiply
from lorainit.linalg.triangle import Triangle, gram_of_lower, lower_inverse
from torch import Tensor

import lorainit
from benchmarks.timing import parts
from benchmarks.timing.cases import SHAPES, Case
from benchmarks.timing.clock import cleared, limited, provenance
from benchmarks.timing.model import batches_of, build, config
from lorainit import linalg
from lorainit.linalg import leading, limits, triangle
from lorainit.methods import EVA, CorDA, FILet, LoraDA, LoraGA, Natural, lora_da, metric
from lorainit.types import LayerStatistics

RANK = 8
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


class Study:
    """Runs parts one by one, each with its limit, and says what came out as it goes."""

    def __init__(self, device: torch.device, out: Path | None, end: float) -> None:
        self.device, self.out, self.end = device, out, end

    def say(self, record: dict[str, Any]) -> None:
        line = json.dumps(record)
        print(line[:1500], flush=True)
        if self.out is not None:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def run(self, name: str, work: Callable[[], dict[str, Any]], limit: int = 25) -> None:
        left = int(self.end - time.monotonic())
        if left < 3:
            print(f"{name}: no time left", flush=True)
            return
        begin = time.monotonic()
        try:
            with limited(min(limit, left)):
                found = work()
        except Exception as error:
            traceback.print_exc(limit=4)
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        self.say({"name": name, **found, "all": round(time.monotonic() - begin, 2)})
        cleared()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def milliseconds(self, work: Callable[[], Any], repeats: int = 5) -> Any:
        try:
            work()
            self.wait()
            begin = time.perf_counter()
            for _ in range(repeats):
                work()
            self.wait()
            return round((time.perf_counter() - begin) / repeats * 1e3, 3)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:160]


class Marks:
    """Seconds between marks, the device drained at each."""

    def __init__(self, study: Study) -> None:
        self.study, self.spent = study, defaultdict(float)
        study.wait()
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        self.study.wait()
        now = time.perf_counter()
        self.spent[name] += now - self.last
        self.last = now


# --- single operations ---------------------------------------------------------------------------


def thin_products(study: Study, m: int, n: int, batch: int) -> dict[str, Any]:
    """One matrix of a batch times a thin block, milliseconds; the bytes alone at 4.8 TB/s beside it."""
    matrix = torch.randn(batch, m, n, device=study.device)
    halves = Halves.of(matrix)
    high = halves.parts[:, :m]
    found: dict[str, Any] = {"bytes": round(4 * m * n / 4.8e9, 3)}
    for width in (24, 32, 96):
        x = torch.randn(batch, n, width, device=study.device)
        y = torch.randn(batch, m, width, device=study.device)
        own = {
            "float32": study.milliseconds(lambda x=x: matrix @ x),
            "float32 T": study.milliseconds(lambda y=y: matrix.mT @ y),
            "halves": study.milliseconds(lambda x=x: halves.times(x)),
            "halves T": study.milliseconds(lambda y=y: halves.transposed_times(y)),
            "half alone": study.milliseconds(lambda x=x: multiply(high, x.half())),
        }
        if study.device.type == "cuda":
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = True
            own["tf32"] = study.milliseconds(lambda x=x: matrix @ x)
            own["tf32 T"] = study.milliseconds(lambda y=y: matrix.mT @ y)
            torch.backends.cuda.matmul.allow_tf32 = before
        found[str(width)] = {
            k: round(v / batch, 4) if isinstance(v, float) else v for k, v in own.items()
        }
    exact = matrix[:1].double() @ x[:1].double()
    for name, got in (
        ("float32", matrix[:1] @ x[:1]),
        ("halves", halves.times(x)[:1]),
    ):
        found[f"error {name}"] = float((got - exact).norm() / exact.norm())
    return found


def factorizations(study: Study, n: int, other: int) -> dict[str, Any]:
    """Of one matrix with a falling spectrum, milliseconds; errors against float64."""
    x = torch.randn(2 * n, n, device=study.device) * (
        torch.arange(1, n + 1, device=study.device) ** -0.5
    )
    second = (x.mT @ x / (2 * n)).double().unsqueeze(0)
    del x
    second.diagonal(dim1=-2, dim2=-1).add_(1e-3 * second.diagonal(dim1=-2, dim2=-1).mean())
    ms = study.milliseconds
    found: dict[str, Any] = {"cholesky": ms(lambda: torch.linalg.cholesky_ex(second[0])[0], 2)}
    lower = torch.linalg.cholesky_ex(second[0])[0].unsqueeze(0)
    triangle = Triangle(lower)
    thin = torch.randn(1, n, 64, device=study.device, dtype=torch.float64)
    wide = torch.randn(1, n, other, device=study.device)
    found |= {
        "inverse, float64": ms(lambda: lower_inverse(lower), 2),
        **{f"Triangle {b}": ms(lambda b=b: Triangle(lower, b), 2) for b in (512, 1024, 2048)},
        **{
            f"thin solve {b}": ms(partial(Triangle(lower, b).solve, thin))
            for b in (512, 1024, 2048)
        },
        "thin solve T": ms(lambda: triangle.solve_transposed(thin)),
        "thin trsm": ms(lambda: torch.linalg.solve_triangular(lower, thin, upper=False), 2),
        "inverse in halves": ms(triangle.inverse_quickly, 2),
        "inverse in halves, 1024": ms(Triangle(lower, 1024).inverse_quickly, 2),
        "wide solve in halves": ms(lambda: triangle.solve_quickly(wide), 2),
        "wide solve in halves, 1024": ms(lambda: Triangle(lower, 1024).solve_quickly(wide), 2),
        "wide trsm, float64": ms(
            lambda: torch.linalg.solve_triangular(lower, wide.double(), upper=False), 2
        ),
    }
    exact = lower_inverse(lower)
    quick = triangle.inverse_quickly()
    found["gram of the inverse in halves"] = ms(lambda: gram_of_lower(quick), 2)
    found["Halves.of"] = ms(lambda: Halves.of(quick), 2)
    found["error inverse"] = float(
        torch.linalg.matrix_norm(quick - exact) / torch.linalg.matrix_norm(exact)
    )
    truth = exact @ wide.double()
    found["error wide solve"] = float((triangle.solve_quickly(wide) - truth).norm() / truth.norm())
    found["error thin solve"] = float(
        (triangle.solve(thin) - exact @ thin).norm() / (exact @ thin).norm()
    )
    return found


# --- solves -----------------------------------------------------------------------------------------


def stacks(
    found: lorainit.Statistics, shape: Any, needs: frozenset[str]
) -> dict[str, LayerStatistics]:
    made = {}
    for name, members in GROUPS.items():
        layers = [
            found[f"model.layers.{i}.{m}"].only(needs).to(dtype=None)
            for i in range(shape.layers)
            for m in members
        ]
        made[name] = LayerStatistics.stack(layers, sharing=len(members))
    return made


def from_model(
    shape: Any, device: torch.device, tiny: bool
) -> Callable[[frozenset[str]], dict[str, LayerStatistics]]:
    """Stacks of a random model's own statistics."""
    sizes = (8, 64) if tiny else (256, 512)
    case = Case("study", "start", "study", sequences=sizes[0], tokens=sizes[1])
    with torch.enable_grad():
        found = lorainit.collect_statistics(
            build(shape, device),
            config(case),
            data=batches_of(case),
            needs=LoraDA().needs | Natural().needs | EVA().needs,
            progress=False,
        )
    cleared()
    return lambda needs: stacks(found, shape, needs)


def made_up(shape: Any, device: torch.device, needs: frozenset[str]) -> dict[str, LayerStatistics]:
    sizes = {
        "o": (shape.hidden, shape.hidden),
        "gate up": (shape.inner, shape.hidden),
        "down": (shape.hidden, shape.inner),
    }
    return {
        name: LayerStatistics.stack([parts.synthetic(*size, device, needs).only(needs)] * 2)
        for name, size in sizes.items()
    }


def count(stack: LayerStatistics, name: str, layers: int) -> float:
    """How often a stack stands in the whole model."""
    in_model = {"qkv": 3, "o": 1 if layers else 4, "gate up": 2, "down": 1}[name] * 32
    tensor = stack.gradient if stack.gradient_sum is not None else stack.input_second_moment
    return in_model / tensor.shape[:-2].numel()


def sine(first: Tensor, second: Tensor) -> float:
    """Largest over the stack; subspaces of columns."""
    u, v = (torch.linalg.qr(t.double())[0] for t in (first, second))
    return float(torch.linalg.matrix_norm(v - u @ (u.mT @ v), ord=2).max())


def solved(
    study: Study,
    stacked: dict[str, LayerStatistics],
    layers: int,
    work: Callable[[LayerStatistics, Marks, bool], Tensor],
    truth: dict[str, Tensor],
    exact: bool,
) -> dict[str, Any]:
    """Seconds for the model by stack and by part, the angle to the truth, errors over what is allowed."""
    found: dict[str, Any] = {"seconds": 0.0, "stacks": {}, "parts": defaultdict(float)}
    for name, stack in stacked.items():
        work(stack, Marks(study), exact)
        marks = Marks(study)
        begin = time.perf_counter()
        basis = work(stack, marks, exact)
        study.wait()
        times = count(stack, name, layers)
        seconds = (time.perf_counter() - begin) * times
        found["seconds"] += seconds
        for part, spent in marks.spent.items():
            found["parts"][part] += spent * times
        own = {k: round(v * times, 3) for k, v in marks.spent.items()}
        entry: dict[str, Any] = {"seconds": round(seconds, 3), "parts": own}
        if name in truth:
            entry["sine"] = sine(truth[name], basis)
        else:
            truth[name] = basis
        found["stacks"][name] = entry
        cleared()
    found["seconds"] = round(found["seconds"], 3)
    found["parts"] = {k: round(v, 3) for k, v in found["parts"].items()}
    return found


def solving(method: Any, layers: int) -> Any:
    """A method's own solve; marks by its larger parts."""

    def work(stack: LayerStatistics, marks: Marks, exact: bool) -> Tensor:
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
        with watched(marks):
            return method.solve(weight, read, RANK, 4.0).A.mT

    return work


PARTS = (
    (linalg, "damped_cholesky"),
    (linalg, "top_singular"),
    (linalg, "smallest_of_operator"),
    (linalg, "largest_eigenvectors"),
    (triangle.Triangle, "__init__"),
    (triangle.Triangle, "inverse_quickly"),
    (lora_da, "gram_of_lower"),
    (metric.KroneckerMetric, "whiten_gradient"),
    (metric.KroneckerMetric, "out_of"),
)


@contextlib.contextmanager
def watched(marks: Marks) -> Iterator[None]:
    def marked(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            marks("between")
            found = work(*args, **kwargs)
            marks(name)
            return found

        return timed

    with contextlib.ExitStack() as stack:
        for where, name in PARTS:
            stack.enter_context(mock.patch.object(where, name, marked(name, getattr(where, name))))
        yield
    marks("between")


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
                return solved(study, stacked, layers, solving(method, layers), truth, exact)

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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=("llama-2-7b", "tiny"), default="llama-2-7b")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=115)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    study = Study(device, options.out, time.monotonic() + options.seconds)
    study.say({"name": "provenance", **provenance(device)})
    tiny = options.shape == "tiny"
    shape = replace(SHAPES[options.shape], layers=2 if tiny else 4)
    if tiny:
        shape = replace(shape, hidden=256, inner=400, kv_heads=shape.heads)
        limits.DENSE_LIMIT = 128
        limits.has_matrix_units = linalg.has_matrix_units = lambda like: True
        global RANK
        RANK = 2
    hidden, inner = shape.hidden, shape.inner
    with (
        mock.patch.dict(SHAPES, {"study": shape}),
        torch.no_grad(),
        without_dense(256 if tiny else 512),
    ):
        study.run("thin, square", lambda: thin_products(study, hidden, hidden, 4))
        study.run("thin, wide", lambda: thin_products(study, hidden, inner, 2))
        study.run("thin, large square", lambda: thin_products(study, inner, inner, 2))
        study.run("factors, hidden", lambda: factorizations(study, hidden, inner))
        study.run("factors, inner", lambda: factorizations(study, inner, hidden))
        study_solves(study, "flat", shape.layers, from_model(shape, device, tiny))
        study_solves(study, "falling", 0, lambda n: made_up(shape, device, n))
    return 0


if __name__ == "__main__":
    sys.exit(main())
