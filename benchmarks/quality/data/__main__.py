"""Task texts as fixed-length token arrays: made once, then read without a tokenizer.

``python -m benchmarks.quality.data`` writes one compressed file a task to the cache. Tokens are one model's
own: ``--model gemma-3-270m`` makes Gemma's, in a folder of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quality.data.files import default_folder, load_pools, prepare
from benchmarks.quality.data.reasoning import DEFAULT, TASKS, WORDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--model", choices=list(WORDS), default=DEFAULT, help="of reasoning tasks")
    parser.add_argument("--out", type=Path, help="folder; by default in the cache")
    parser.add_argument("--style", choices=("plain", "chat"), default="plain", help="of the prompt")
    arguments = parser.parse_args()
    out = arguments.out or default_folder(arguments.model)
    for task in arguments.tasks:
        path = prepare(task, out, arguments.style, arguments.model)
        pools = load_pools(task, out)
        shape = tuple(pools["train"].tokens.shape)
        slots = pools["train"].targets.shape[1]
        size = path.stat().st_size / 1e6
        print(f"{task}: train {shape}, {slots} label slots, {size:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
