"""bitsandbytes bases, 8-bit and 4-bit: what the package promises of them, checked one by one.

    python -m benchmarks.quantized [--output quantized.jsonl] [--bits 8 4]

A small random Llama is quantized on loading, on an accelerator where there is one, else on the CPU.
One JSON line a check, with the figures that it rests on; the exit status is that of all together.
tests/life/test_quantized.py runs the same checks where bitsandbytes is installed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.common import json_lines
from benchmarks.quantized.checks import run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    options = parser.parse_args(arguments)
    good = True
    for record in run(options.bits):
        json_lines.say(record, options.output)
        good = good and record["passed"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
