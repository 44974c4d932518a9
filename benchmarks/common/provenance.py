"""Where and with what a measurement was made."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import lorainit


def provenance(device: torch.device) -> dict[str, Any]:
    """Device, versions, revision and date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    revision = ""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        revision = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()
    return {
        "device": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "lorainit": lorainit.__version__,
        "revision": revision,
        "date": time.strftime("%Y-%m-%d"),
    }
