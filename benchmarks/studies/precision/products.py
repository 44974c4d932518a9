"""How many products an iteration takes to a goal, on made-up matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common.subspaces import sine_between
from lorainit.linalg import leading, subspace_iteration
from lorainit.methods import LoraDA, lora_da
from lorainit.types import LayerStatistics

RANK = 8

SHAPES = (("flat", 2048, 2048), ("flat", 1536, 4096), ("falling", 2048, 2048))

GOALS = (3e-4, 1e-3, 3e-3)


class Products:
    """Counts what an iteration multiplies by its matrix, filters and measurements alike."""

    def __init__(self) -> None:
        self.count = 0

    def filtered(
        self, apply: Any, ritz: Any, *rest: Any, **options: Any
    ) -> subspace_iteration.Ritz:
        def counted(function: Any) -> Any:
            def call(block: Tensor) -> Any:
                self.count += 1
                return function(block)

            return call

        return self.original(counted(apply), counted(ritz), *rest, **options)

    def __enter__(self) -> Products:
        self.original = subspace_iteration.filtered
        self._patch = mock.patch.object(subspace_iteration, "filtered", self.filtered)
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
