"""Stages over many tasks and all accelerators of a host: one process a card, task after task.

    python -m benchmarks.quality.launch search seeds sweep:train_samples=64 --tasks chain_sum digits \\
        --data .cache/quality-chat .cache/quality --model smollm2-135m-instruct=.cache/packed \\
        --methods vanilla natural --out OUT --time-limit 500

Every task's stages run one after the other, each in a process of its own (``benchmarks.quality``),
on the next card that is free; tasks are begun in the order given, so name the longest first. A task's data
folder is the first that has it; its model and the style of its prompts are those of its data there (``--set
model=NAME+GRID``: the same model, quantized). Records are in ``OUT/TASK``; the same call goes on where one
stopped.
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.quality.data.files import model_of_data, style_of
from benchmarks.quality.models.registry import model_of
from benchmarks.quality.records import RESULTS

LEAST = 15.0
"""Seconds below which no stage is begun."""


def stage_arguments(stage: str) -> list[str]:
    """``"sweep:rank=1,4"`` to what ``benchmarks.quality`` takes; other stages are their names."""
    name, _, budget = stage.partition(":")
    if not budget:
        return [name]
    over, _, values = budget.partition("=")
    return [name, "--over", over, "--values", *values.split(",")]


def folder_of(task: str, folders: Sequence[Path]) -> Path:
    """The first folder with the task's prepared data.

    Raises:
        FileNotFoundError: none has it.
    """
    for folder in folders:
        if (folder / f"{task}.npz").exists():
            return folder
    where = ", ".join(map(str, folders))
    raise FileNotFoundError(
        f"no data of '{task}' in {where}: python -m benchmarks.quality.data --tasks {task}"
    )


def command(
    stage: str,
    task: str,
    folders: Sequence[Path],
    models: Mapping[str, str],
    out: Path,
    limit: float,
    rest: Sequence[str],
) -> list[str]:
    """The call of one stage of one task."""
    folder = folder_of(task, folders)
    name = model_of_data(task, folder)
    made = [sys.executable, "-m", "benchmarks.quality", *stage_arguments(stage)]
    made += ["--tasks", task, "--data", str(folder), "--set", f"style={style_of(task, folder)}"]
    if name != model_of([task]):
        made += [f"model={name}"]
    made += ["--out", str(out / task), "--records", str(RESULTS), str(out)]
    made += ["--time-limit", f"{limit:.0f}", *rest]
    return made + (["--model", models[name]] if name in models else [])


def run_all(
    tasks: Sequence[str],
    cards: Sequence[str],
    work: Callable[[str, str], None],
) -> None:
    """`work(task, card)` for every task, one at a time on each card, begun in their order.

    Raises:
        RuntimeError: of some tasks, after all have been tried.
    """
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for card in cards:
        free.put(card)

    def on_a_free_card(task: str) -> None:
        card = free.get()
        try:
            work(task, card)
        finally:
            free.put(card)

    with ThreadPoolExecutor(len(cards)) as pool:
        begun = [pool.submit(on_a_free_card, task) for task in tasks]
    failed = [error for future in begun if (error := future.exception()) is not None]
    if failed:
        raise RuntimeError("; ".join(map(str, failed))) from failed[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stages", nargs="+", help="search, grid, seeds, or sweep:BUDGET=VALUE,VALUE"
    )
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders, first wins")
    parser.add_argument("--model", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, default=1e9, help="seconds, for all of it")
    arguments, rest = parser.parse_known_args()
    models = dict(pair.split("=", 1) for pair in arguments.model)
    began = time.monotonic()
    for task in arguments.tasks:
        folder_of(task, arguments.data)
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    cards = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    cards = cards or [""]

    def work(task: str, card: str) -> None:
        (arguments.out / task).mkdir(parents=True, exist_ok=True)
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": card} if card else {})
        for stage in arguments.stages:
            left = arguments.time_limit - (time.monotonic() - began)
            if left < LEAST:
                print(f"{task}: no time left for {stage}", flush=True)
                return
            call = command(stage, task, arguments.data, models, arguments.out, left, rest)
            with (arguments.out / task / "log.txt").open("a", encoding="utf-8") as log:
                done = subprocess.run(call, env=environment, stdout=log, stderr=log, check=False)
            said = (arguments.out / task / "log.txt").read_text(encoding="utf-8").strip()
            last = said.splitlines()[-1] if said else "nothing said"
            print(f"{task}, {stage}: {last}", flush=True)
            if done.returncode:
                raise RuntimeError(f"{task}, {stage} failed: {arguments.out / task}/log.txt")

    run_all(arguments.tasks, cards, work)


if __name__ == "__main__":
    main()
