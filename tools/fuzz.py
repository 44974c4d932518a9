"""Mutate statistics files, adapter folders, records, options and curves, and read them.

    python -m tools.fuzz [--count N] [--seed S]

Exit code 1 where anything but the package's own errors came out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

from tests.faults.mutations import fuzz, subjects


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="mutations of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    every: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, subject in subjects(Path(folder)).items():
            refused, broken = fuzz(name, subject, options.count, options.seed)
            print(
                f"{name}: {options.count} mutations, {refused} refused, {len(broken)} broken",
                flush=True,
            )
            every += broken
    for line in every[:50]:
        print("BROKEN", line)
    return 1 if every else 0


if __name__ == "__main__":
    sys.exit(main())
