"""Every architecture of transformers, tiny and random: does it start as it is, with right numbers?

    python -m benchmarks.architectures --out sweep.jsonl --jobs 32        again to go on where it stopped
    python -m benchmarks.architectures --out some.jsonl --families CTC --names wav2vec2 wavlm
    python -m benchmarks.architectures --keep sweep.jsonl      records to results/architectures.jsonl,
                                                               the page docs/architectures.md; of an entry
                                                               that is in several files the last counts
    python -m benchmarks.architectures --show sweep.jsonl      counts, and what does not start

Of every entry of eleven mappings it is asked, in a process of its own: does the model run by itself, forward
and backward; does stock PEFT adapt it; do statistics agree with autograd of the model's own loss, and
do not depend on how rows are batched; does it start by four methods with no argument but the data.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}
"""Set before the libraries are imported: one thread a process, no network, no accelerator."""


def main(arguments: list[str] | None = None) -> int:
    os.environ.update(QUIET)
    from benchmarks.architectures.tiny.families import FAMILIES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="JSON lines; entries that are in it are passed over"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--names", nargs="+", default=[], help="model types; default: all")
    parser.add_argument("--seconds", type=float, default=120, help="limit of an entry")
    parser.add_argument("--gib", type=float, default=32, help="address space of an entry")
    parser.add_argument(
        "--keep", type=Path, nargs="+", help="keep records, and make the page of them"
    )
    parser.add_argument("--show", type=Path, nargs="+", help="print what records come to")
    options = parser.parse_args(arguments)
    if options.keep or options.show:
        from benchmarks.architectures import tables

        if options.keep:
            tables.keep(options.keep)
        if options.show:
            print(tables.summary(options.show))
        return 0
    if options.out is None:
        parser.error("--out is needed to run")
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    import torch

    from benchmarks.architectures.schedule import run_all
    from benchmarks.architectures.tiny.families import entries
    from benchmarks.common import json_lines
    from benchmarks.common.provenance import provenance

    torch.set_num_threads(1)
    out: Path = options.out
    records = json_lines.read(out) if out.exists() else []
    done = {(record["family"], record["name"]) for record in records if "family" in record}
    wanted = [e for e in entries(options.families, options.names) if e not in done]
    if not records:
        out.parent.mkdir(parents=True, exist_ok=True)
        json_lines.say({"provenance": provenance(torch.device("cpu"))}, out)
    limits = {"jobs": options.jobs, "seconds": options.seconds, "gib": options.gib}
    for number, record in enumerate(run_all(wanted, **limits), 1):
        json_lines.add(record, out)
        entry = f"{record['family']} {record['name']}"
        print(f"{number}/{len(wanted)} {entry}: {record['outcome']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
