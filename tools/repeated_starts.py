"""Start, save and load an adapter again and again in one process, and look what has grown.

    python -m tools.repeated_starts [--count 500]

Exit code 1 where memory, descriptors, threads or hooks grew after the warm-up.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings

import torch
from tests.life.growth import growth, starts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    begin = time.monotonic()
    before, after, grown = growth(*starts(), options.count, options.warm_up)
    print(f"after {options.warm_up} starts: {before}")
    print(f"after {options.count} more:  {after}")
    print("\n".join(f"GROWN {line}" for line in grown) or "nothing has grown")
    print(f"{time.monotonic() - begin:.0f} s")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
