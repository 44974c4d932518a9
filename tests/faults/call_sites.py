"""Raising at one call site of the package: the n-th time that a line of it calls something."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lorainit

_ROOT = str(Path(lorainit.__file__).parent)

_LEAVING = ("__exit__", "__del__", "close", "disable")
"""Functions by which a block is left: what is raised before their first line leaves nothing to run that
could put anything back, in Python itself."""

Site = tuple[str, int]
"""File and line of a call: where a function of the package was called from, or the function itself."""


class Injected(Exception):
    """What no code of the package raises or catches by its name."""


class InjectedInterrupt(KeyboardInterrupt):
    """The same as from the user's keyboard."""


def calls(work: Callable[[], object]) -> Counter[Site]:
    """How often `work` passes each line of the package from which a Python function is called."""
    found: Counter[Site] = Counter()
    _traced(work, lambda site: found.update([site]))
    return found


def raising(
    work: Callable[[], object], site: Site, number: int, error: type[BaseException]
) -> BaseException | None:
    """Do `work`, and raise at the site's call of this number; what came out of it."""
    seen = 0

    def act(here: Site) -> None:
        nonlocal seen
        if here == site:
            seen += 1
            if seen == number:
                raise error(f"{site[0]}:{site[1]}, call {number}")

    try:
        _traced(work, act)
    except BaseException as caught:
        return caught
    return None


def _traced(work: Callable[[], object], act: Callable[[Site], None]) -> None:
    def trace(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            caller = frame.f_back
            if frame.f_code.co_name in _LEAVING:
                return
            if caller is not None and caller.f_code.co_filename.startswith(_ROOT):
                act((caller.f_code.co_filename[len(_ROOT) + 1 :], caller.f_lineno))

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
