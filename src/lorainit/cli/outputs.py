"""What ``--output`` may name: found out before the work, not after."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from lorainit.files.aside import Aside
from lorainit.files.folder import is_interrupted
from lorainit.files.marked import STATISTICS, check_target


def is_page(content: bytes) -> bool:
    """Whether a file holds an HTML page, as 'lorainit report' writes it."""
    return content.lstrip()[:14].lower() == b"<!doctype html"


def is_comparison(content: bytes) -> bool:
    """Whether a file holds what 'lorainit compare' writes."""
    try:
        table = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(table, dict) and {"best", "runs"} <= set(table)


def check_file(output: str, is_ours: Callable[[bytes], bool]) -> None:
    """A file that cannot be written, or that holds something else, is no place for a result.

    Raises:
        OSError: with the reason, and another place to give.
    """
    path = Path(output)
    if path.is_dir():
        raise OSError(f"--output {output} cannot be written: it is a folder. Give a file's name.")
    content = path.read_bytes() if path.is_file() else b""
    if content and not is_ours(content):
        raise OSError(
            f"--output {output} is there and holds something else, which is not written over. Give "
            "another name."
        )
    _check_writable(path.parent, output)


def check_statistics_file(output: str) -> None:
    """The same of statistics: data, weights and other files' indices are left alone."""
    path = Path(output)
    if path.is_dir():
        raise OSError(f"--output {output} cannot be written: it is a folder. Give a file's name.")
    check_target(path, STATISTICS)
    _check_writable(path.parent, output)


def check_folder(output: str, model: str) -> None:
    """The same of an adapter's folder, and that nothing but an adapter would be written over."""
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise OSError(f"--output {output} cannot be written: it is a file. Give a folder.")
    if path.exists() and os.path.isdir(model) and os.path.samefile(path, model):
        raise OSError(f"--output {output} is the model's own folder. Give another one.")
    there = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if there and "adapter_config.json" not in there and not is_interrupted(path):
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        raise OSError(
            f"--output {output} holds other things than an adapter ({', '.join(there[:3])}{more}). "
            "Give a new or an empty folder."
        )
    _check_writable(path if path.exists() else path.parent, output)


def _check_writable(folder: Path, output: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = Aside(folder)
        try:
            aside.discard()
        finally:
            # Again, for an interrupt before it was gone.
            aside.discard()
    except OSError as error:
        raise OSError(
            f"--output {output} cannot be written ({error.strerror}). Give another place."
        ) from None
