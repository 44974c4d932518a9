"""Raise at every call site of the package, kill at every file operation, mutate files, and look what is left.

    python -m tools.faults [sites] [kills] [mutations] [--jobs N] [--records FOLDER] [--time-limit SECONDS]

Every fault is a line of JSON in the records' folder; the same command again goes on where the last one
stopped. The tests (tests/faults) take a few of each. Exit code 0: all done and survived; 1: something did
not hold; 3: the time was over before the work was.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tools.faults.shares import Plan, run_shares, summary

KINDS = ("sites", "kills", "mutations")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="all three unless said")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one share each")
    parser.add_argument("--records", type=Path, default=Path("outputs/faults"))
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds, of all")
    parser.add_argument("--hang", type=float, default=120, help="seconds a single fault may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="operations, saves or files by name")
    parser.add_argument("--count", type=int, default=2000, help="mutations of each kind of file")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    plan = Plan(
        tuple(options.kinds) or KINDS,
        options.records,
        options.seed,
        tuple(options.only),
        options.count,
        options.begun or time.time(),
    )
    if options.share:
        from tools.faults.work import work_on

        index, jobs = map(int, options.share.split("/"))
        work_on(plan, index, jobs)
        return 0
    finished = run_shares(plan, options.jobs, options.time_limit, options.hang)
    broken = summary(plan)
    if not finished:
        print("the time is over: the same command goes on from here")
    return 1 if broken else 0 if finished else 3


if __name__ == "__main__":
    sys.exit(main())
