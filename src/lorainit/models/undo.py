"""Putting something back, an interrupt meanwhile included."""

from __future__ import annotations

from collections.abc import Callable


def surely(step: Callable[..., object], *arguments: object) -> None:
    """Do a step that may be done twice; again from its beginning where it is interrupted.

    It is meant for ``ExitStack.callback``: between the end of a block and the first line of a function that is
    called in ``finally`` an interrupt would still come too early.
    """
    try:
        step(*arguments)
    except BaseException:
        step(*arguments)
        raise
