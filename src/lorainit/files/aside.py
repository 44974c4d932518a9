"""Files and folders that are written aside: under names that nobody can foresee, and locked meanwhile.

Whoever finds one that is not locked knows that its writer is gone, and may remove it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import time
from pathlib import Path
from typing import Any, BinaryIO

fcntl: Any
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_NAME = re.compile(r"\.lorainit-[0-9a-f]{32}\.aside")
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_STALE = 86400.0
"""Seconds after which a file is taken for left over, where files cannot be locked."""


class Aside:
    """A new file in a folder, open for writing; its mode is what the user's umask leaves.

    Attributes:
        path: where it is now.
        file: to write to.
    """

    def __init__(self, folder: Path) -> None:
        while True:
            self.path = folder / _fresh_name()
            number = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW, 0o666)
            try:
                self.file: BinaryIO = os.fdopen(number, "wb")
                # Between the two somebody may have taken it for left over.
                if lock(number) is not False and self.path.exists():
                    return
            except BaseException:
                with contextlib.suppress(OSError):
                    self.path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    # The file object closes its own; a number twice closed may be another's.
                    self.file.close() if hasattr(self, "file") else os.close(number)
                raise
            self.file.close()

    def put(self, target: Path, *, final: bool = True) -> None:
        """Let it take its place, over whatever file has that name.

        Args:
            target: its place.
            final: it stays there whatever comes; if not, `discard` still removes it.
        """
        self.file.flush()
        os.replace(self.path, target)
        if not final:
            self.path = target

    def discard(self) -> None:
        """Remove it, unless it has its final place."""
        try:
            self.close()
        finally:
            # After an interrupt in the closing too.
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Unlock it."""
        # What a full disk has not taken is of no use any more.
        with contextlib.suppress(OSError):
            self.file.close()


def make_folder(beside: Path) -> tuple[Path, int | None]:
    """A new folder aside in `beside`, and what to close when it is done with."""
    while True:
        path = beside / _fresh_name()
        number = None
        try:
            path.mkdir()
            if fcntl is None:
                return path, None
            number = os.open(path, os.O_RDONLY)
            if lock(number) is not False and path.exists():
                return path, number
            os.close(number)
        except BaseException:
            with contextlib.suppress(OSError):
                path.rmdir()
            if number is not None:
                os.close(number)
            raise


def lock(number: int) -> bool | None:
    """Lock an open file for this writer; False: another has it, None: files cannot be locked here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_aside(name: str) -> bool:
    """Whether a file or folder of this name was written aside by this package."""
    return _NAME.fullmatch(name) is not None


def sweep(folder: Path) -> None:
    """Remove what writers that are gone have left in the folder; links are left alone."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if is_aside(name):
                _remove_if_stale(folder / name)


def _remove_if_stale(path: Path) -> None:
    with contextlib.suppress(OSError):
        about = path.lstat()
        if stat.S_ISLNK(about.st_mode):
            return
        number = os.open(path, os.O_RDONLY | _NOFOLLOW)
        try:
            free = lock(number)
            if free is None:
                free = time.time() - about.st_mtime > _STALE
            if free and stat.S_ISDIR(about.st_mode):
                shutil.rmtree(path, ignore_errors=True)
            elif free:
                path.unlink()
        finally:
            os.close(number)


def _fresh_name() -> str:
    return f".lorainit-{secrets.token_hex(16)}.aside"
