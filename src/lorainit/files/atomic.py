"""Small files, written aside and renamed: what was there before survives a failure."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, or leave the file, if any, as it was.

    Raises:
        OSError: of the disk's own; nothing is left beside the file.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
