"""Statistics that no data can give are refused when they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorainit
from lorainit.errors import StatisticsFileError
from lorainit.statistics.store.possible import check_possible
from lorainit.types import LayerStatistics


def good(rows: int = 7, width: int = 5, dtype: torch.dtype = torch.float32) -> LayerStatistics:
    """Sums over rows of numbers: whatever the data, they are possible."""
    generator = torch.Generator().manual_seed(rows)
    x, g = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return LayerStatistics(
        gradient_sum=(g.mT @ x).to(dtype),
        input_second_moment_sum=(x.mT @ x).to(dtype),
        input_sum=x.sum(0).to(dtype),
        output_second_moment_sum=(g.mT @ g).to(dtype),
        output_second_moment_diagonal_sum=g.square().sum(0).to(dtype),
        sequences=2.0,
        label_tokens=float(rows),
        positions=float(rows),
    )


def at(field: str, place: Any, value: float) -> Callable[[LayerStatistics], LayerStatistics]:
    def change(layer: LayerStatistics) -> LayerStatistics:
        tensor = getattr(layer, field).clone()
        tensor[place] = value
        return replace(layer, **{field: tensor})

    return change


IMPOSSIBLE: dict[str, Callable[[LayerStatistics], LayerStatistics]] = {
    "negative square": at("input_second_moment_sum", (2, 2), -1.0),
    "negative square of gradients": at("output_second_moment_sum", (0, 0), -1e-3),
    "negative diagonal": at("output_second_moment_diagonal_sum", 1, -1.0),
    "product beyond squares": at("input_second_moment_sum", (0, 1), 1e3),
    "not symmetric": at("input_second_moment_sum", (0, 1), 0.5),
    "sum beyond squares": at("input_sum", 0, 1e3),
    "no positions": lambda layer: replace(layer, positions=0.0),
    "no sequences": lambda layer: replace(layer, sequences=0.0),
}


@pytest.mark.parametrize("case", sorted(IMPOSSIBLE))
def test_impossible_statistics_are_refused(case: str, tmp_path: Path) -> None:
    layer = IMPOSSIBLE[case](good())
    lorainit.Statistics({"a": layer}).save(tmp_path / "s.safetensors")
    with pytest.raises(StatisticsFileError, match="is impossible"):
        lorainit.Statistics.load(tmp_path / "s.safetensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 50])
def test_sums_over_data_are_possible(rows: int, dtype: torch.dtype) -> None:
    """The negative control: a single row has all its products at the bound."""
    check_possible("a", good(rows, dtype=dtype))
    check_possible("a", good(rows, width=600, dtype=dtype))
