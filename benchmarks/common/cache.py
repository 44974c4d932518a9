"""Where downloads and generated texts are kept."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def cache_folder() -> Path:
    """``LORAINIT_CACHE``, or ``.cache`` in the repository; made if it is not there."""
    folder = Path(os.environ.get("LORAINIT_CACHE") or REPOSITORY / ".cache").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
