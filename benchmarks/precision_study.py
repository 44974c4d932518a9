"""What an earlier end of the iterations saves and costs, and ``precision="fast"`` beside ``"exact"``.

    python -m benchmarks.precision_study --out precision.jsonl        on a CPU, about five minutes

Made-up matrices of three spectra, solved to several goals against dense float64; then twelve layers of
SmolLM2-135M from sequences of its own tokenizer's English (the project's documentation), also with
gradients added up in bfloat16. Random numbers are seeded. What came out stands in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig
from torch import Tensor

import lorainit
from benchmarks.common.models import load_smollm2, load_smollm2_tokenizer
from benchmarks.quality.initialise import start_of
from benchmarks.timing.clock import provenance
from benchmarks.timing.parts import sine_between
from lorainit.linalg import leading, subspace
from lorainit.methods import FILet, LoraDA, LoraGA, LoraOne, Natural, lora_da
from lorainit.types import LayerStatistics

RANK = 8
SHAPES = (("flat", 2048, 2048), ("flat", 1536, 4096), ("falling", 2048, 2048))
GOALS = (3e-4, 1e-3, 3e-3)
DOCUMENTS = ("README.md", "docs/theory.md", "docs/index.md")


class Products:
    """Counts what an iteration multiplies by its matrix, filters and measurements alike."""

    def __init__(self) -> None:
        self.count = 0

    def filtered(self, apply: Any, ritz: Any, *rest: Any, **options: Any) -> subspace.Ritz:
        def counted(function: Any) -> Any:
            def call(block: Tensor) -> Any:
                self.count += 1
                return function(block)

            return call

        return self.original(counted(apply), counted(ritz), *rest, **options)

    def __enter__(self) -> Products:
        self.original = subspace.filtered
        self._patch = mock.patch.object(subspace, "filtered", self.filtered)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def singular() -> Iterator[dict[str, Any]]:
    """Leading triplets: to what float32 resolves, and to `leading.EACH` of each value."""
    for spectrum, rows, columns in SHAPES:
        matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        if spectrum == "falling":
            matrix = matrix * torch.logspace(0, -2, columns)
        values, vectors = torch.linalg.svd(matrix.double(), full_matrices=False)[1:]
        best = float(values[:RANK].square().sum())
        for each in (0.0, leading.EACH):
            with Products() as products, mock.patch.object(leading, "EACH", each):
                found = leading.top_singular(matrix, RANK)[2].double()
            held = float((matrix.double() @ found).square().sum())
            yield {
                "name": f"singular {spectrum} {rows} x {columns}, {each:g}", "each": each,
                "products": products.count, "sine": sine_between(found, vectors[:RANK].mT),
                "energy_lost": 1 - held / best,
            }  # fmt: skip


def made_up(
    kind: str, inputs: int = 1024, outputs: int = 1536, tokens: int = 8192
) -> LayerStatistics:
    """Strong directions over noise with flat or falling inputs, or noise alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator)
    g = torch.randn(tokens, outputs, generator=generator)
    if kind != "flat":
        x *= torch.logspace(0, -1.5, inputs)
    if kind != "noise":
        g[:, :20] += 3 * x[:, :20]
    return LayerStatistics(
        gradient_sum=g.mT @ x, input_second_moment_sum=x.mT @ x,
        output_second_moment_diagonal_sum=g.square().sum(0),
        sequences=tokens, label_tokens=tokens, positions=tokens,
    )  # fmt: skip


def objective() -> Iterator[dict[str, Any]]:
    """LoRA-DA's goals, by how far its objective stays from the least."""
    method = LoraDA()
    for kind in ("flat", "falling", "noise"):
        fisher = method._fisher(made_up(kind))
        least = method._dense(fisher, RANK)[0]
        inverse = torch.cholesky_inverse(fisher.z_factor)
        change = -(inverse @ fisher.scaled().mT)
        omega = fisher.variance * inverse - change @ change.mT

        def value(basis: Tensor, omega: Tensor = omega) -> float:
            return float((basis * (omega @ basis)).sum())

        for each in GOALS:
            with Products() as products, mock.patch.object(lora_da, "EACH", each):
                found = method._iterated(fisher, RANK, exact=False)
            assert found is not None
            basis = found[0].double()
            yield {
                "name": f"LoRA-DA {kind}, {each:g}", "each": each, "products": products.count,
                "sine": sine_between(basis, least),
                "objective_gap": (value(basis) - value(least)) / abs(value(least)),
            }  # fmt: skip


def sequences(tokenizer: Any, count: int, length: int = 128) -> Tensor:
    """``(count, length)`` tokens of English prose."""
    root = Path(__file__).resolve().parents[1]
    text = "".join((root / name).read_text(encoding="utf-8") for name in DOCUMENTS)
    return torch.tensor(tokenizer(text)["input_ids"][: count * length]).reshape(count, length)


def config() -> LoraConfig:
    """Twelve layers."""
    return LoraConfig(
        r=RANK, lora_alpha=16, use_rslora=True, layers_to_transform=[2, 15, 28],
        target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"],
    )  # fmt: skip


def apart(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far two starts of the same layers are from each other: largest, and median."""
    sines, changes = [], []
    for name, pair in one.items():
        (a, b), (c, d) = ([x.double() for x in p] for p in (pair, other[name]))
        sines.append(sine_between(a.mT, c.mT))
        changes.append(float((b @ a - d @ c).norm() / (d @ c).norm()))
    middle = len(sines) // 2
    return {
        "layers": len(sines), "sine": max(sines), "sine_median": sorted(sines)[middle],
        "product": max(changes), "product_median": sorted(changes)[middle],
    }  # fmt: skip


def layers() -> Iterator[dict[str, Any]]:
    """Twelve layers of SmolLM2 from 16 sequences of 128 tokens, fast beside exact."""
    model = load_smollm2()
    ids = sequences(load_smollm2_tokenizer(), 16)
    data = [{"input_ids": part, "labels": part} for part in ids.split(8)]
    needs = Natural().needs | LoraDA().needs
    statistics = lorainit.collect_statistics(
        model, config(), data=data, needs=needs, progress=False
    )
    for method in (LoraDA(), FILet(), Natural(length=1.0)):
        found, seconds = {}, {}
        for precision in ("fast", "exact"):
            began = time.process_time()
            wrapped = lorainit.get_peft_model(
                model, config(), method=method, statistics=statistics, precision=precision,
                progress=False,
            )  # fmt: skip
            seconds[precision] = time.process_time() - began
            found[precision] = start_of(wrapped).factors
            model = wrapped.unload()
        name = f"SmolLM2, {type(method).__name__}"
        yield {"name": name, **apart(found["fast"], found["exact"]), "cpu_seconds": seconds}


def sums() -> Iterator[dict[str, Any]]:
    """The same layers from 32 sequences, gradients added up in bfloat16 beside float32: few batches, and many.

    And from the same sequences in a model that computes in bfloat16, which is what rounds without them.
    """
    model = load_smollm2()
    ids = sequences(load_smollm2_tokenizer(), 32)

    def statistics(rows: int, dtype: str) -> lorainit.Statistics:
        return lorainit.collect_statistics(
            model, config(), data=[{"input_ids": x, "labels": x} for x in ids.split(rows)],
            needs=LoraDA().needs, gradient_dtype=dtype, progress=False,  # type: ignore[arg-type]
        )  # fmt: skip

    def started(method: Any, found: lorainit.Statistics) -> dict[str, Any]:
        nonlocal model
        wrapped = lorainit.get_peft_model(
            model, config(), method=method, statistics=found, precision="exact", progress=False
        )
        factors = start_of(wrapped).factors
        model = wrapped.unload()
        return factors

    kinds = {"float32": statistics(8, "float32")}
    kinds |= {f"bfloat16, {32 // rows} batches": statistics(rows, "bfloat16") for rows in (8, 1)}
    model = model.to(torch.bfloat16)
    kinds["float32, model in bfloat16"] = statistics(8, "float32")
    model = load_smollm2()
    for method in (LoraGA(), LoraOne(), LoraDA()):
        wide = started(method, kinds["float32"])
        for kind, found in list(kinds.items())[1:]:
            name = f"sums in {kind}, {type(method).__name__}"
            yield {"name": name, **apart(started(method, found), wide)}


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
