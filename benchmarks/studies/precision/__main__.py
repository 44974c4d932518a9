"""What an earlier end of the iterations saves and costs, and ``precision="fast"`` beside ``"exact"``.

    python -m benchmarks.studies.precision --out precision.jsonl        on a CPU, about five minutes

Made-up matrices of three spectra, solved to several goals against dense float64; then twelve layers of
SmolLM2-135M from sequences of its own tokenizer's English (the project's documentation), also with
gradients added up in bfloat16. Random numbers are seeded. What came out stands in docs/performance.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.common import json_lines
from benchmarks.common.provenance import provenance
from benchmarks.studies.precision.products import objective, singular
from benchmarks.studies.precision.smollm2 import layers, sums


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.write_text("", encoding="utf-8")
    json_lines.say(provenance(torch.device("cpu")), arguments.out)
    for part in (singular, objective, layers, sums):
        for record in part():
            json_lines.say(record, arguments.out)


if __name__ == "__main__":
    main()
