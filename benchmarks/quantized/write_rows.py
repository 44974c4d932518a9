"""Write rows of text and of tasks as tokens of one model, for machines without its tokenizer and for the cache.

    python -m benchmarks.quantized.write_rows --model smollm2 --output rows-smollm2.npz

``python -m benchmarks.quantized.recover`` reads the file (``--rows-file``), and makes it in the cache where it
is given none.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.cache import cache_folder
from benchmarks.quality.data.pools import Pool
from benchmarks.quantized.bases import BASES
from benchmarks.quantized.token_rows import encoder_rows, language_rows, write

ROWS, LENGTH = 128, 128
"""Of a data set, and of a row of text."""


def default_path(model: str) -> Path:
    return cache_folder() / "quantized" / f"rows-{model}.npz"


def rows_of(model: str, tasks: Sequence[str], rows: int, length: int) -> dict[str, Pool]:
    """Every data set of a model, made with its tokenizer."""
    base = BASES[model]
    tokenizer = base.tokenizer()
    if base.encoder:
        return encoder_rows(
            tokenizer, tasks, rows, length, default_path(model).parent / "sentences"
        )
    return language_rows(tokenizer, tasks, rows, length)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, choices=BASES)
    parser.add_argument("--output", type=Path, help="by default in the cache")
    parser.add_argument("--rows", type=int, default=ROWS, help="of each data set")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens a row of text")
    parser.add_argument("--tasks", nargs="*", help="by default all of the model's")
    options = parser.parse_args(arguments)
    path = options.output or default_path(options.model)
    tasks = BASES[options.model].tasks if options.tasks is None else options.tasks
    pools = rows_of(options.model, tasks, options.rows, options.length)
    write(pools, path)
    for name, pool in pools.items():
        print(f"{name}: {len(pool)} rows of at most {int(pool.lengths.max())} tokens")
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
