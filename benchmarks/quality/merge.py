"""Add the ``records.jsonl`` files of finished calls to the kept records.

``python -m benchmarks.quality.merge FOLDER ...``
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quality.records import RESULTS, append, keep, read_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    have = read_records([arguments.into])
    new = read_records(arguments.folders)
    keep(arguments.into, new.values())
    failed = read_records(arguments.folders, "failures")
    known = read_records([arguments.into], "failures")
    fresh = [r for key, r in failed.items() if key not in known]
    for record in fresh:
        append(arguments.into, record, "failures")
    added = len(new.keys() - have.keys())
    print(f"{added} new records, {len(new) - added} replaced, {len(fresh)} new failures")


if __name__ == "__main__":
    main()
