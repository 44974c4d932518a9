"""Task texts as fixed-length token arrays: made once, then read without a tokenizer.

``python -m benchmarks.quality.data`` writes one compressed file a task to the cache.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quality.data.files import default_folder, load_pools, prepare
from benchmarks.quality.data.reasoning import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--out", type=Path, default=default_folder())
    parser.add_argument("--style", choices=("plain", "chat"), default="plain", help="of the prompt")
    arguments = parser.parse_args()
    for task in arguments.tasks:
        path = prepare(task, arguments.out, arguments.style)
        pools = load_pools(task, arguments.out)
        shape = tuple(pools["train"].tokens.shape)
        slots = pools["train"].targets.shape[1]
        size = path.stat().st_size / 1e6
        print(f"{task}: train {shape}, {slots} label slots, {size:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
