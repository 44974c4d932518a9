"""Small files, written aside and renamed: what was there before survives a failure."""

from __future__ import annotations

from pathlib import Path

from lorainit.files.aside import Aside, sweep


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, or leave the file, if any, as it was.

    Raises:
        OSError: of the disk's own; nothing is left beside the file.
    """
    sweep(path.parent)
    aside = Aside(path.parent)
    try:
        aside.file.write(text.encode("utf-8", "backslashreplace"))
        aside.put(path)
    except BaseException:
        aside.discard()
        raise
    aside.close()
