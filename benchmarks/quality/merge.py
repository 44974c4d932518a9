"""Put returned ``records.jsonl`` files under ``benchmarks/results/quality``, one file a record.

``python -m benchmarks.quality.merge FOLDER ...``
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quality.records import RESULTS, append, read_records, write_single


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    have = read_records([arguments.into])
    new = read_records(arguments.folders)
    for record in new.values():
        write_single(arguments.into, record)
    failed = read_records(arguments.folders, "failures")
    known = read_records([arguments.into], "failures")
    fresh = [r for key, r in failed.items() if key not in known]
    for record in fresh:
        append(arguments.into, record, "failures")
    added = len(new.keys() - have.keys())
    print(f"{added} new records, {len(new) - added} replaced, {len(fresh)} new failures")


if __name__ == "__main__":
    main()
