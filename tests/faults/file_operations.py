"""Failing, or dying, at one file operation of some work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

KILLED = 77

_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}


class _Watch:
    """What the process's one audit hook does; hooks cannot be removed."""

    def __init__(self) -> None:
        self.folder = ""
        self.act: Callable[[str], None] | None = None
        self.installed = False

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.act is None or event not in _EVENTS:
            return
        place = arguments[0]
        if not isinstance(place, str | bytes | os.PathLike):
            return
        if self.folder in os.fsdecode(place):
            self.act(event)


_watch = _Watch()


def _watched(work: Callable[[], object], folder: Path, act: Callable[[str], None]) -> None:
    if not _watch.installed:
        sys.addaudithook(_watch)
        _watch.installed = True
    _watch.folder, _watch.act = str(folder), act
    try:
        work()
    finally:
        _watch.act = None


def count(work: Callable[[], object], folder: Path) -> int:
    """File operations of `work` in the folder; it is done."""
    seen: list[str] = []
    _watched(work, folder, seen.append)
    return len(seen)


def failing(
    work: Callable[[], object], folder: Path, number: int, error: BaseException
) -> BaseException | None:
    """Do `work`, whose file operation of this number raises `error`; what it raised itself."""
    seen: list[str] = []

    def act(event: str) -> None:
        seen.append(event)
        if len(seen) == number:
            raise error

    try:
        _watched(work, folder, act)
    except BaseException as caught:
        return caught
    return None


def dying(work: Callable[[], object], folder: Path, number: int) -> bool:
    """Do `work` in a process of its own, which is killed before this file operation; whether it was."""
    child = os.fork()
    if child == 0:
        seen: list[str] = []

        def act(event: str) -> None:
            seen.append(event)
            if len(seen) == number:
                os._exit(KILLED)

        try:
            torch.set_num_threads(1)
            _watched(work, folder, act)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == KILLED
