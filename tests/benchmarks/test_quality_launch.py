"""Stages over many tasks: what is called, and in which order."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from benchmarks.quality.launch import command, main, run_all


def data(folder: Path, task: str, style: str, **more: str) -> Path:
    folder.mkdir(exist_ok=True)
    arrays = {"style": style} | more
    np.savez(folder / f"{task}.npz", **{name: np.array(value) for name, value in arrays.items()})
    return folder


def test_the_call_names_the_tasks_own_model_data_and_style(tmp_path):
    folders = [
        data(tmp_path / "chat", "chain_sum", "chat"),
        data(tmp_path / "plain", "digits", "plain", kind="image"),
    ]
    data(folders[1], "chain_sum", "plain")
    models = {"vit-mnist": "vit", "smollm2-135m-instruct": "packed"}
    text = " ".join(
        command(
            "sweep:rank=1,4",
            "chain_sum",
            folders,
            models,
            tmp_path / "out",
            99.6,
            ["--methods", "eva"],
        )
    )
    assert " sweep --over rank --values 1 4 --tasks chain_sum " in text
    assert f"--data {folders[0]} --set style=chat --out {tmp_path}/out/chain_sum " in text
    assert text.endswith("--time-limit 100 --methods eva --model packed")
    text = " ".join(command("search", "digits", folders, models, tmp_path, 5, []))
    assert "--set style=plain" in text
    assert text.endswith("--model vit")
    # Tokens of another model than the task's usual one.
    folder = data(tmp_path / "gemma", "chain_sum", "plain", model="gemma-3-270m")
    models["gemma-3-270m"] = "gemma"
    rest = ["--set", "model=gemma-3-270m+nf4"]
    text = " ".join(command("grid", "chain_sum", [folder], models, tmp_path, 5, rest))
    assert "--set style=plain model=gemma-3-270m --out" in text
    assert text.endswith("--set model=gemma-3-270m+nf4 --model gemma")
    with pytest.raises(FileNotFoundError, match="movies"):
        command("search", "movies", folders, models, tmp_path, 5, [])


def test_each_card_has_one_task_at_a_time_and_a_failure_does_not_stop_the_others():
    meet = threading.Barrier(2, timeout=20)
    busy: dict[str, str] = {}
    done = []

    def work(task: str, card: str) -> None:
        assert card not in busy
        busy[card] = task
        if task in "ab":
            # Both cards are at work at once, or this times out.
            meet.wait()
        del busy[card]
        if task == "b":
            raise RuntimeError("b is broken")
        done.append(task)

    with pytest.raises(RuntimeError, match="b is broken"):
        run_all("abcd", ["0", "1"], work)
    assert sorted(done) == ["a", "c", "d"]


def test_stages_of_a_task_follow_each_other_and_an_error_names_the_log(tmp_path, monkeypatch):
    """The calls themselves, with another program in place of Python."""
    folder = data(tmp_path / "data", "chain_sum", "plain")
    arguments = ["launch", "search", "seeds", "--tasks", "chain_sum", "--data", str(folder)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path / "out")])
    monkeypatch.setattr("benchmarks.quality.launch.torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(sys, "executable", "echo")
    main()
    lines = (tmp_path / "out" / "chain_sum" / "log.txt").read_text().splitlines()
    assert [line.split()[2] for line in lines] == ["search", "seeds"]
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match=r"chain_sum, search failed: .*log\.txt"):
        main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--time-limit", "0"])
    main()
