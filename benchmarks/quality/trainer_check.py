"""Is the stacked, captured trainer right and quick here? Prints one JSON line a question.

With ``--model`` (a packed model) it trains for real, in both precisions; without, random weights of
the same shape answer what hangs on shapes alone. The kind of model is that of the data in ``--data``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import lorainit
from benchmarks.quality.data.files import load_pools, model_of_data
from benchmarks.quality.data.order import batch_order
from benchmarks.quality.data.pools import Pool
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.initialization import Initialiser, lora_config
from benchmarks.quality.models.registry import kind_of
from benchmarks.quality.stacks import statistics_batch
from benchmarks.quality.training.adapters import Base
from benchmarks.quality.training.reference import score_plain, train_plain
from benchmarks.quality.training.trainer import Job, StackTrainer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_model(name: str, device: torch.device, layers: int | None = None) -> Any:
    """A language model's shape."""
    torch.manual_seed(0)
    if name == "gemma-3-270m":
        shape = Gemma3TextConfig(
            vocab_size=262144,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=layers or 18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            sliding_window=512,
        )
        with device:
            return Gemma3ForCausalLM(shape).eval()
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers or 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        rope_theta=100000.0,
    )
    with device:
        return LlamaForCausalLM(config).eval()


def make_trainer(
    base: Base, pools: dict[str, Pool], experiment: Experiment, stack: int, graphs: bool
) -> StackTrainer:
    return StackTrainer(
        base,
        stack=stack,
        rank=experiment.rank,
        anchored=False,
        scaling=experiment.scaling,
        train=pools["train"],
        batch_size=experiment.batch_size,
        max_steps=experiment.steps,
        warmup=experiment.warmup,
        clip=experiment.clip,
        graphs=graphs,
    )


def report(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def speed(base: Base, pools: dict[str, Pool], start: Any, stack: int, name: str) -> None:
    """Seconds of a capture, a training step and an evaluation, and the memory of the stack."""
    experiment = Experiment("chain_sum", "vanilla", 1e-3, steps=48)
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    trainer = make_trainer(base, pools, experiment, stack, graphs=True)
    torch.cuda.synchronize()
    capture = time.perf_counter() - began
    order = batch_order(len(pools["train"]), 4096, 0, 48, 32)
    trainer.run([Job(start, 1e-3, order)] * stack)
    outcome = trainer.run([Job(start, 1e-3, order)] * stack)[0]
    evaluated = trainer.run(
        [Job(start, 1e-3, order[:0])] * stack, scores={"test": pools["test"].first(512)}
    )[0]
    step = outcome.train_seconds / 48
    report(
        precision=name, stack=stack, capture_s=round(capture, 2), step_ms=round(1e3 * step, 2),
        run_128_s=round(128 * step / stack, 3),
        evaluate_512_s=round(evaluated.evaluate_seconds / stack, 3),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 1),
    )  # fmt: skip
    del trainer
    torch.cuda.empty_cache()


def profile(base: Base, pools: dict[str, Pool], start: Any, stack: int) -> None:
    """Where the device's time goes in a training step."""
    experiment = Experiment("chain_sum", "vanilla", 1e-3, steps=4)
    trainer = make_trainer(base, pools, experiment, stack, graphs=True)
    trainer.load([Job(start, 1e-3, batch_order(len(pools["train"]), 4096, 0, 4, 32))] * stack)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        trainer._train_once()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    for row in rows[:16]:
        share = row.self_device_time_total / 1e3
        report(kernel=row.key[:90], calls=row.count, ms=round(share, 2))


def agreement(name: str, model: Any, pools: dict[str, Pool], device: torch.device) -> None:
    """The captured stack of three against three plain runs, all in float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    base = kind_of(name).base(model, torch.float32, device.type == "cuda")
    runs = [
        Experiment("chain_sum", "vanilla", lr, seed=s, steps=12, batch_size=8, model=name)
        for lr, s in ((1e-3, 0), (3e-3, 1), (1e-4, 2))
    ]
    initialise = Initialiser(model, batch_size=min(32, statistics_batch(model)))
    trainer = make_trainer(base, pools, runs[0], 3, graphs=device.type == "cuda")
    jobs = []
    for run in runs:
        order = batch_order(len(pools["train"]), run.train_samples, run.seed, run.steps, 8)
        jobs.append(Job(initialise(run, pools["train"]).start, run.learning_rate, order))
    validation = pools["validation"].first(128)
    outcomes = trainer.run(jobs, scores={"validation": validation})
    for run, job, outcome in zip(runs, jobs, outcomes, strict=True):
        torch.manual_seed(run.seed)
        wrapped = lorainit.get_peft_model(
            model, lora_config(run), method=lorainit.Vanilla(), progress=False
        )
        losses = train_plain(
            wrapped, pools["train"].to(device), job.order, learning_rate=run.learning_rate
        )
        after = score_plain(wrapped, validation.to(device))[0].mean()
        wrapped.unload()
        gap = max(abs(a - b) for a, b in zip(losses, outcome.train_loss, strict=True))
        report(
            agreement=run.learning_rate, worst_loss_gap=gap, last_loss=losses[-1],
            heldout_plain=float(after), heldout_stack=float(outcome.scores["validation"][0].mean()),
        )  # fmt: skip
    torch.backends.cuda.matmul.allow_tf32 = True


def precision(kind: str, model: Any, pools: dict[str, Pool]) -> None:
    """Whole runs in float32, TF32 and bfloat16, from the same starts on the same data."""
    methods = [("vanilla", 6.3e-4), ("vanilla", 1.6e-3), ("lora-one", 1.6e-3), ("natural", 1.6e-3)]
    runs = [
        Experiment(
            "chain_sum",
            name,
            rate,
            settings={"length": 0.1} if name == "natural" else {},
            model=kind,
        )
        for name, rate in methods
    ]
    initialise = Initialiser(model, batch_size=min(32, statistics_batch(model)))
    jobs = []
    for run in runs:
        found = initialise(run, pools["train"], together=runs)
        order = batch_order(len(pools["train"]), 4096, 0, run.steps, run.batch_size)
        jobs.append(Job(found.start, run.learning_rate, order))
        report(
            method=run.label,
            collect_s=round(found.collect_seconds, 2),
            solve_s=round(found.solve_seconds, 2),
        )
    for name in ("fp32", "tf32", "bf16"):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        base = kind_of(kind).base(model, dtype, True)
        trainer = make_trainer(base, pools, runs[0], len(runs), graphs=True)
        curve = pools["validation"].first(128)
        outcomes = trainer.run(
            jobs, curve=curve, curve_at=[0, 8, 32, 128], scores={"test": pools["test"]}
        )
        for run, outcome in zip(runs, outcomes, strict=True):
            loss, exact = outcome.scores["test"]
            report(
                precision=name, method=run.label, lr=run.learning_rate,
                test_loss=round(float(loss.mean()), 4), exact=round(float(exact.mean()), 4),
                curve={k: round(v, 3) for k, v in outcome.curve.items()},
                train_s=round(outcome.train_seconds, 2),
            )  # fmt: skip
        del trainer, base
        torch.cuda.empty_cache()
    torch.backends.cuda.matmul.allow_tf32 = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a packed model")
    parser.add_argument("--data", type=Path, required=True, help="folder of prepared tasks")
    parser.add_argument("--stacks", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--precisions", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--layers", type=int, help="of random weights")
    parser.add_argument("--only", nargs="*", default=["agreement", "speed", "profile", "precision"])
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    kind = model_of_data("chain_sum", arguments.data)
    if arguments.model:
        model = kind_of(kind).load(arguments.model, device)
    else:
        model = random_model(kind, device, arguments.layers)
    pools = load_pools("chain_sum", arguments.data, kind)
    report(loaded_s=round(time.perf_counter() - began, 2))
    if "agreement" in arguments.only:
        agreement(kind, model, pools, device)
    if device.type == "cpu":
        return
    start = Initialiser(model, batch_size=min(32, statistics_batch(model)))(
        Experiment("chain_sum", "vanilla", 1e-3), pools["train"]
    ).start
    for name in arguments.precisions:
        dtype = DTYPES[name]
        if "speed" in arguments.only or "profile" in arguments.only:
            base = kind_of(kind).base(model, dtype, True)
        if "speed" in arguments.only:
            for stack in arguments.stacks:
                speed(base, pools, start, stack, name)
        if "profile" in arguments.only and name == "bf16":
            profile(base, pools, start, max(arguments.stacks))
    if "precision" in arguments.only and arguments.model:
        precision(kind, model, pools)
    report(total_s=round(time.perf_counter() - began, 2))


if __name__ == "__main__":
    main()
