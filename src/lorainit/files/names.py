"""What a model or a data set is given by: a place on this disk, or ``OWNER/NAME`` on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lorainit.errors import DataError

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SPLIT = re.compile(r"(:[\w.%:\[\]+-]+)?")


def is_hub_name(text: str) -> bool:
    """Whether it has the form ``OWNER/NAME``; a path of more parts, or that begins with a dot, has not."""
    return _HUB_NAME.fullmatch(text) is not None


def is_data_set(path: str | os.PathLike[str]) -> bool:
    """Whether records are to be had from ``OWNER/NAME`` or ``OWNER/NAME:SPLIT``, or else from a file.

    Raises:
        DataError: it is neither such a name nor a file.
    """
    text, file = str(path), Path(path)
    if file.is_file():
        return False
    name, colon, split = text.partition(":")
    named = is_hub_name(name) or os.path.isdir(name)
    if not named or text.endswith((".json", ".jsonl")) or not _SPLIT.fullmatch(colon + split):
        raise DataError(f"there is no data file '{path}'. Give a file of JSON lines.")
    return True
