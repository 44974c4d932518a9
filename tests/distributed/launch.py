"""Several processes with a gloo group, from a server that has imported everything already."""

from __future__ import annotations

import datetime
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fresh import server

GROUP_TIMEOUT = 60.0
"""Seconds; a machine that does much else at once is slow."""


class Failed:
    """What a process raised: the kind and the text of the error, and where."""

    def __init__(self, error: BaseException) -> None:
        self.kind, self.text = type(error).__name__, str(error)
        self.trace = traceback.format_exc()

    def __repr__(self) -> str:
        return self.trace


def launch(
    scenario: Callable[..., Any], size: int, folder: Path, *args: Any, timeout: float = 240.0
) -> list[Any]:
    """Every process's result or `Failed`; None for a process that died."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    processes = [
        server().Process(target=_work, args=(scenario, rank, size, folder, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hung:
        processes[rank].kill()
    assert not hung, f"processes {hung} did not end within {timeout:g} s"
    paths = [folder / f"{rank}.pickle" for rank in range(size)]
    return [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]


def succeeded(results: list[Any]) -> list[Any]:
    for result in results:
        assert result is not None, "a process died"
        if isinstance(result, Failed):
            raise AssertionError(result.trace)
    return results


def _work(
    scenario: Callable[..., Any], rank: int, size: int, folder: Path, args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    from lorainit.calibration.paired import Gain

    # As in tests/conftest.py, which processes that are forked from a server do not see.
    Gain.clear = True  # type: ignore[method-assign, assignment]
    torch.set_num_threads(1)
    torch.manual_seed(100 + rank)  # what depends on a process's own randomness shall be seen
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=GROUP_TIMEOUT),
    )
    try:
        result = scenario(rank, size, *args)
    except Exception as error:
        result = Failed(error)
    path = folder / f"{rank}.pickle"
    path.with_suffix(".part").write_bytes(pickle.dumps(result))
    path.with_suffix(".part").rename(path)
    if not isinstance(result, Failed):
        dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
