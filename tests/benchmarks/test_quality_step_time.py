"""A step of one adapter alone and a start alone are timed as the stages run them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from benchmarks.quality import step_time
from benchmarks.quality.data.files import load_pools
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.initialization import Initialiser
from benchmarks.quality.records import read_records
from benchmarks.quality.training.trainer import StackTrainer

from tests.benchmarks.test_quality_models import bert, write

SMALL = {
    "rank": 2, "steps": 6, "batch_size": 4, "train_samples": 32, "statistics_samples": 16,
}  # fmt: skip


def test_the_lines_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "text")
    monkeypatch.setattr(step_time, "load_model", lambda folder, device, name: bert())
    monkeypatch.setattr(step_time, "choose_device", lambda: None)
    out = tmp_path / "out" / "times.jsonl"
    settings = [f"{key}={value}" for key, value in SMALL.items()]
    arguments = (
        f"x --data {tmp_path} --tasks text --methods pissa eva --repeats 1 --out {out} --set"
    )
    monkeypatch.setattr(sys, "argv", [*arguments.split(), *settings])
    began = time.perf_counter()
    step_time.main()
    whole = time.perf_counter() - began
    found = list(map(json.loads, out.read_text().splitlines()))
    assert [r.get("label") for r in found] == [None, "pissa", "eva"]
    assert all(r["model"] == "all-minilm-l6-v2" and r["task"] == "text" for r in found)
    assert 0 < found[0]["step_seconds"] * SMALL["steps"] < whole
    assert all(0 < r["start_seconds"] < whole for r in found[1:])
    # They are no records of runs.
    assert not read_records([tmp_path])


def test_a_stack_of_one_takes_all_steps_and_the_first_run_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that says what each run took: a cold run of 99 s, then 6, 12 and 60 s of six steps each."""
    write(tmp_path, "text")
    seconds = iter([99.0, 6.0, 12.0, 60.0])
    stacks = []
    run = StackTrainer.run

    def timed(self, jobs, **more):
        (outcome,) = run(self, jobs, **more)
        stacks.append((self.stack, len(jobs[0].order), len(outcome.train_loss)))
        outcome.train_seconds = next(seconds)
        return [outcome]

    monkeypatch.setattr(StackTrainer, "run", timed)
    (found,) = step_time.measure(bert(), "all-minilm-l6-v2", "text", tmp_path, **SMALL)
    assert found["step_seconds"] == 12.0 / 6
    assert stacks == [(1, 6, 6)] * 4


def test_every_timed_start_collects_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "text")
    collected = []
    collect = Initialiser._collect

    def counted(self, experiment, train, together):
        collected.append(set(experiment.build_method().needs))
        assert not together
        return collect(self, experiment, train, together)

    monkeypatch.setattr(Initialiser, "_collect", counted)
    train = load_pools("text", tmp_path)["train"]
    line = Experiment("text", "eva", 1e-3, model="all-minilm-l6-v2", precision="fp32", **SMALL)
    assert step_time.start_seconds(bert(), line, train, repeats=2) > 0
    assert len(collected) == 3
    # Negative control: one initialiser keeps what it has.
    initialise = Initialiser(bert())
    initialise(line, train)
    initialise(line, train)
    assert len(collected) == 4
