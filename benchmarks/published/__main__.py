"""Rewrite every block of figures on the pages from the kept records: ``python -m benchmarks.published``.

A block stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``. With ``--check`` nothing
is written and stale blocks are named, as the suite does.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.published.pages import PAGES, stale, with_blocks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, name what is stale")
    options = parser.parse_args()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        names = stale(text)
        if names and not options.check:
            page.write_text(with_blocks(text), encoding="utf-8")
        for name in names:
            print(f"{page.name}: {name} {'is stale' if options.check else 'rewritten'}")
        if names and options.check:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
