"""One-off studies; what each recorded lies in ``results`` under its name."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
