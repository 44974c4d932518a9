"""Failing, or dying, at one file operation of some work."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

KILLED = 77

_EVENTS = {
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link",
}  # fmt: skip
_ELSEWHERE = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"}
_METHODS = {"write", "writelines", "flush", "truncate", "close"}
"""Of file objects, which no audit event tells."""


class _Watch:
    """What the process's one audit hook does; hooks cannot be removed."""

    def __init__(self) -> None:
        self.folder = ""
        self.act: Callable[[str], None] | None = None
        self.written: list[str] | None = None
        self.installed = False

    def install(self) -> None:
        if not self.installed:
            sys.addaudithook(self)
            self.installed = True

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.written is not None and event in _ELSEWHERE:
            self.written.append(event)
        if (self.act is None and self.written is None) or event not in _EVENTS:
            return
        place = arguments[0]
        if not isinstance(place, str | bytes | os.PathLike):
            return
        path = os.fsdecode(place)
        if self.act is not None and self.folder in path:
            self.act(event)
        if self.written is not None and (event != "open" or _for_writing(arguments)):
            self.written.append(f"{event} {path}")


_watch = _Watch()


def _for_writing(arguments: tuple[object, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


@contextlib.contextmanager
def writing(found: list[str]) -> Iterator[None]:
    """Note whatever is opened for writing, renamed, removed or made inside, and what goes to a network."""
    _watch.install()
    _watch.written = found
    try:
        yield
    finally:
        _watch.written = None
        # Modules that are imported for the first time, and what is thrown away.
        found[:] = [what for what in found if "__pycache__" not in what and "/dev/null" not in what]


def _watched(work: Callable[[], object], folder: Path, act: Callable[[str], None]) -> None:
    _watch.install()
    _watch.folder, _watch.act = str(folder), act

    def profile(frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call" or _watch.act is None:
            return
        name = getattr(called, "__name__", "")
        ours = name in _METHODS and str(folder) in _file_of(getattr(called, "__self__", None))
        if ours or name == "serialize_file":
            act(name)

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        _watch.act = None


def _file_of(held: object) -> str:
    """Where the file of a file object lies; nothing for other objects, and for a closed one."""
    if not isinstance(held, io.IOBase) or held.closed:
        return ""
    name = getattr(held, "name", "")
    if isinstance(name, int):
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{name}")
        return ""
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else ""


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
