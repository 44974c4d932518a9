"""How long should the rows of ``A`` be? One start, the same product, sizes moved from ``A`` to ``B``.

    python -m benchmarks.studies.row_sizes --tasks chain_sum --out OUT --data DATA --model PACKED

Natural's starts after one and four steps, and plain LoRA's, are trained with rows of several sizes at
several learning rates: half a budget (or ``--steps``), the validation split. What came out stands in
docs/natural.md.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import lorainit
from benchmarks.quality.arguments import add_common
from benchmarks.quality.bench import Bench
from benchmarks.quality.data.files import load_pools, style_of
from benchmarks.quality.experiment import Experiment, curve_steps
from benchmarks.quality.initialization import Initialised, lora_config
from benchmarks.quality.models.loading import choose_device, load_model
from benchmarks.quality.models.registry import defaults, model_of
from benchmarks.quality.records import append, read_records
from benchmarks.quality.stacks import batch_rows_of, stack_for
from benchmarks.quality.stages import SHORT_STEPS
from benchmarks.quality.time_limit import Clock, OutOfTime
from benchmarks.quality.training.adapters import Start
from benchmarks.quality.training.trainer import Job
from benchmarks.studies import RESULTS

KINDS = ("norm", "activation", "mean activation", "decorrelated")

BALANCED = ("balanced", "balanced, spare rows random")

SIZES = (
    ("norm", 0.25), ("norm", 1.0), ("activation", 0.25), ("activation", 0.5), ("mean activation", 0.25),
    ("balanced", 0.25), ("balanced", 0.5), ("balanced", 1.0), ("balanced, spare rows random", 0.5),
)  # fmt: skip

PLAIN = (("norm", 1.0), ("norm", 0.25), ("norm", 2.0), ("decorrelated", 1.0))

RATES = (6.3e-4, 1.6e-3, 4e-3)


def resized(start: Start, moments: Mapping[str, Tensor], kind: str, size: float) -> Start:
    """The same product with other rows of ``A``.

    Args:
        start: not anchored.
        moments: ``Sx`` ``(in, in)`` by layer.
        kind: ``"norm"``: rows times `size`; ``"activation"``: each row so long that ``a x`` is `size`
            times a default LoRA's; ``"mean activation"``: one factor for all of a layer's rows;
            ``"decorrelated"``: rows mixed so that the components of ``A x`` are also uncorrelated.
        size: see `kind`.
    """
    factors = {}
    for name, (a, b) in start.factors.items():
        rows, columns = a.double(), b.double()
        second = moments[name].to(rows)
        gram = rows @ second @ rows.mT
        wanted = size * (second.diagonal().mean() / 3).sqrt()
        eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        if kind == "norm":
            change, back = size * eye, eye / size
        elif kind == "decorrelated":
            values, vectors = torch.linalg.eigh(gram)
            roots = values.clamp_min(1e-10 * values[-1]).sqrt() / wanted
            change, back = ((vectors * r) @ vectors.mT for r in (1 / roots, roots))
        else:
            seen = gram.diagonal()
            seen = seen.mean().expand_as(seen) if kind == "mean activation" else seen
            factor = wanted / seen.sqrt()
            change, back = factor.diag(), (1 / factor).diag()
        factors[name] = ((change @ rows).to(a), (columns @ back).to(b))
    return Start(factors, {}, start.extras)


def balanced(
    start: Start,
    statistics: Mapping[str, lorainit.LayerStatistics],
    scaling: float,
    kind: str,
    size: float,
) -> Start:
    """The same product with rows as `Natural` sizes them, at least `size` of a default's activations.

    Args:
        start: not anchored.
        statistics: what Natural reads, by layer.
        scaling: ``s``.
        kind: one of `BALANCED`.
        size: ``Natural(activation=)``.
    """
    method = lorainit.Natural(activation=size)
    seeds = itertools.count() if kind == BALANCED[1] else itertools.repeat(None)
    factors = {
        name: method.factors(
            scaling * b, a, scaling, statistics[name], None if seed is None else [seed]
        )
        for (name, (a, b)), seed in zip(start.factors.items(), seeds, strict=False)
    }
    return Start(factors, {}, start.extras)


def study(bench: Bench, task: str, seed: int, done: set[str], style: str, steps: int) -> None:
    """One task and seed; every run is a line of ``row_sizes.jsonl``."""
    pools = load_pools(task, bench.data, model_of([task]))
    pools = {k: p.to(bench.device) for k, p in pools.items()}
    common: dict[str, Any] = defaults(task) | {"steps": steps, "style": style}
    natural = Experiment(task, "natural", 1e-3, seed, {"steps": 4, "spare": None}, **common)
    experiments = {
        "natural, 1 steps": natural.at(settings={"steps": 1, "spare": None}, init="data"),
        "natural, 4 steps": natural,
        "plain": Experiment(task, "vanilla", 1e-3, seed, **common),
    }
    starts = {
        name: bench.initialise(experiment, pools["train"], [experiment]).start
        for name, experiment in experiments.items()
    }
    statistics = lorainit.collect_statistics(
        bench.model,
        lora_config(natural),
        data=bench.initialise.batches(natural, pools["train"]),
        needs=lorainit.Natural().needs,
        max_sequences=None,
        progress=False,
    )
    moments = {name: statistics[name].input_second_moment for name in statistics}
    runs = [
        (name, kind, size, rate)
        for name in starts
        for (kind, size), rate in itertools.product(PLAIN if name == "plain" else SIZES, RATES)
        if f"{task} {seed} {steps} {name} {kind} {size} {rate}" not in done
    ]

    def changed(name: str, kind: str, size: float) -> Start:
        if kind in BALANCED:
            return balanced(starts[name], statistics, natural.scaling, kind, size)
        return resized(starts[name], moments, kind, size)

    stack = stack_for(pools["train"], bench.stack)
    for first in range(0, len(runs), stack):
        chunk = runs[first : first + stack]
        bench.clock.check(15.0)
        found = Initialised(starts["plain"], 0.0, 0.0)
        trainer = bench.trainer(("rows", task), natural, found, pools, len(chunk))
        order = batch_rows_of(natural, pools)
        jobs = [Job(changed(name, kind, size), rate, order) for name, kind, size, rate in chunk]
        outcomes = trainer.run(
            jobs,
            curve=pools["validation"].first(bench.evaluation_rows),
            curve_at=curve_steps(steps),
            scores={"validation": pools["validation"].first(bench.validation_rows)},
        )
        for (name, kind, size, rate), outcome in zip(chunk, outcomes, strict=True):
            losses, exact = outcome.scores["validation"]
            record = {
                "id": f"{task} {seed} {steps} {name} {kind} {size} {rate}",
                "task": task, "seed": seed, "steps": steps, "start": name, "kind": kind, "size": size,
                "learning_rate": rate, "loss": float(losses.mean()), "exact": float(exact.mean()),
                "curve": outcome.curve,
            }  # fmt: skip
            append(bench.out, record | bench.provenance, "row_sizes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=SHORT_STEPS)
    arguments = parser.parse_args()
    done = set(read_records([RESULTS, *arguments.records, arguments.out], "row_sizes"))
    bench = Bench(
        load_model(arguments.model, choose_device(), model_of(arguments.tasks)),
        arguments.data,
        arguments.out,
        "row_sizes",
        stack=arguments.stack,
        commit=arguments.commit,
        clock=Clock(arguments.time_limit),
    )
    try:
        for task, seed in itertools.product(arguments.tasks, arguments.seeds):
            study(bench, task, seed, done, style_of(task, arguments.data), arguments.steps)
            bench.free()
    except OutOfTime:
        print(f"time limit after {bench.clock.gone:.0f} s; call again", flush=True)


if __name__ == "__main__":
    main()
