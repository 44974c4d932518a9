"""What an earlier end of the iterations saves and costs, and ``precision="fast"`` beside ``"exact"``.

    python -m benchmarks.studies.precision --out precision.jsonl        on a CPU, about five minutes

Made-up matrices of three spectra, solved to several goals against dense float64; then twelve layers of
SmolLM2-135M from sequences of its own tokenizer's English (the project's documentation), also with
gradients added up in bfloat16. Random numbers are seeded. What came out stands in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.provenance import provenance
from benchmarks.studies.precision.products import objective, singular
from benchmarks.studies.precision.smollm2 import layers, sums


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with arguments.out.open("w", encoding="utf-8") as file:

        def say(record: dict[str, Any]) -> None:
            line = json.dumps(record)
            print(line, flush=True)
            file.write(line + "\n")

        say(provenance(torch.device("cpu")))
        for part in (singular, objective, layers, sums):
            for record in part():
                say(record)


if __name__ == "__main__":
    main()
