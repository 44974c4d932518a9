"""Processes that know nothing of a test's own, from a server that has imported everything already."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import runpy
import socket
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
PRELOADED = (
    "tests.preloaded",
    "tests.distributed.scenarios",
    "tests.distributed.trainer_scenarios",
    "tests.life.trainer",
    "tests.life.sft",
)
"""What the server imports, once; one that cannot be imported is left to the process that asks for it."""
_SERVER: Any = None


def server() -> Any:
    """A context whose processes are forked from one that has never run a backward, as those could not be.

    The server is an interpreter of its own: its processes share no objects with the tests, and hash texts
    by another seed.
    """
    global _SERVER
    if _SERVER is None:
        _SERVER = mp.get_context("forkserver")
        _SERVER.set_forkserver_preload(list(PRELOADED))
    return _SERVER


def run_forked(code: str, **values: Any) -> Any:
    """Run code in a new process; `values` are its globals, its global `result` comes back as from JSON."""
    with TemporaryDirectory() as place:
        words = textwrap.dedent(code), json.dumps(values, default=str), place
        _run_all(_code, words, Path(place), ROOT, [{}], 600)
        return json.loads((Path(place) / "result").read_text())


def run_program(
    program: str, words: list[str], folder: Path, processes: int = 1, timeout: float = 400
) -> str:
    """A script's path, or a module's name, run in a folder as by Python's command line; what it says.

    Several processes are told of each other by the variables that torchrun sets.
    """
    settings: list[dict[str, str]] = [{}]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = [
            {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{processes}"}
            | {"LOCAL_WORLD_SIZE": f"{processes}", "MASTER_ADDR": "127.0.0.1"}
            | {"MASTER_PORT": f"{port}"}
            for rank in range(processes)
        ]
    with TemporaryDirectory() as place:
        return _run_all(_program, (program, words), Path(place), folder, settings, timeout)


def _run_all(
    work: Callable[..., None],
    words: tuple[Any, ...],
    place: Path,
    folder: Path,
    settings: list[dict[str, str]],
    timeout: float,
) -> str:
    """One process for each of the settings; what all have written to the terminal."""
    said = [place / f"{number}.said" for number in range(len(settings))]
    processes = [
        server().Process(target=_run, args=(work, words, file, folder, own))
        for file, own in zip(said, settings, strict=True)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    text = "".join(file.read_text(errors="replace") for file in said if file.exists())
    assert not any(process.exitcode for process in processes), text[-12000:]
    return text


def _run(
    work: Callable[..., None],
    words: tuple[Any, ...],
    said: Path,
    folder: Path,
    settings: dict[str, str],
) -> None:
    import torch

    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    os.environ |= settings
    os.chdir(folder)
    torch.set_num_threads(1)
    with said.open("w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        work(*words)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()


def _code(code: str, values: str, place: str) -> None:
    warnings.filterwarnings("ignore")
    names: dict[str, Any] = {"__name__": "fresh"} | json.loads(values)
    exec(compile(code, "fresh", "exec"), names)
    (Path(place) / "result").write_text(json.dumps(names["result"]))


def _program(program: str, words: list[str]) -> None:
    sys.argv = [program, *words]
    if program.endswith(".py"):
        # As Python does: what lies beside the script can be imported.
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
