"""Factors of a stack of layers, and of several displacements at once, are those of each by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lorainit
from lorainit.types import LayerStatistics

RANK, OUT, INNER, SCALING = 4, 10, 14, 2.0
SEEDS = [3, 5, 8, 13]
METHOD = lorainit.Natural()


def layers_of(number: int, inputs: int) -> list[LayerStatistics]:
    """In float64; the first `inputs` layers have inputs of their own, the others that of the one before."""
    generator = torch.Generator().manual_seed(0)

    def draw(width: int) -> Tensor:
        return torch.randn(40, width, generator=generator, dtype=torch.float64)

    seen = [draw(INNER) for _ in range(inputs)]
    found = []
    for i in range(number):
        x, g = seen[i * inputs // number], draw(OUT)
        found.append(
            LayerStatistics(
                gradient_sum=g.mT @ x,
                input_second_moment_sum=x.mT @ x,
                output_second_moment_sum=g.mT @ g,
                sequences=40,
                label_tokens=40,
                positions=40,
            )
        )
    return found


def displacement(layer: LayerStatistics, directions: int) -> tuple[Tensor, Tensor]:
    step = METHOD.step(layer, RANK)
    return step.left * (torch.arange(RANK) < directions), step.right


def stacked(layers: list[LayerStatistics], directions: int) -> tuple[Tensor, Tensor]:
    pairs = [displacement(layer, directions) for layer in layers]
    return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])


@pytest.mark.parametrize("directions", [0, 2, RANK])
def test_factors_of_a_stack_are_those_of_its_layers(directions: int) -> None:
    layers = layers_of(4, 4)
    found = METHOD.factors(
        *stacked(layers, directions), SCALING, LayerStatistics.stack(layers), SEEDS
    )
    for i, layer in enumerate(layers):
        own = METHOD.factors(*displacement(layer, directions), SCALING, layer, [SEEDS[i]])
        for one, all_of_them in zip(own, found, strict=True):
            torch.testing.assert_close(all_of_them[i], one, rtol=1e-10, atol=1e-12)
        # The control: another layer's are others.
        assert not torch.allclose(found[0][i], found[0][i - 1])


def test_each_layers_random_rows_are_those_of_its_seed() -> None:
    layers = layers_of(4, 4)
    a, b = METHOD.factors(*stacked(layers, 1), SCALING, LayerStatistics.stack(layers), SEEDS)
    assert not b[..., 1:].any()
    for rows, seed in zip(a, SEEDS, strict=True):
        numbers = torch.rand(RANK, INNER, generator=torch.Generator().manual_seed(seed))
        assert METHOD.spare is not None
        bound = METHOD.spare / INNER**0.5
        torch.testing.assert_close(rows[1:], (2 * numbers[1:] - 1).double() * bound)


@pytest.mark.parametrize("shared", [False, True])
def test_several_displacements_of_a_stack_at_once(shared: bool) -> None:
    """What is kept of each layer gives the factors that its statistics give, as long as it is asked for."""
    layers, counts = layers_of(4, 2 if shared else 4), [0, 1, 3, RANK]
    left, right = stacked(layers, RANK)
    together = LayerStatistics.stack(layers, sharing=2 if shared else 1)
    groups = (2, 2) if shared else (4,)
    used = torch.stack([torch.arange(RANK) < count for count in counts])
    lefts = (left * used[:, None, None]).reshape(len(counts), *groups, OUT, RANK)
    rights = right.reshape(*groups, RANK, INNER).expand(len(counts), *groups, RANK, INNER)
    energies = METHOD.row_energies(lefts, rights, together).by_displacement()
    stretches = torch.tensor([0.5, 1.0, 2.0, 3.0]).reshape(*groups, 1)
    for own_left, own_right, own in zip(lefts, rights, energies, strict=True):
        longer = own_left * stretches.unsqueeze(-1)
        found = METHOD.factors_from(longer, own_right, SCALING, own, stretches, SEEDS)
        for i, layer in enumerate(layers):
            moved = longer.flatten(0, -3)[i], own_right.flatten(0, -3)[i]
            truth = METHOD.factors(*moved, SCALING, layer, [SEEDS[i]])
            for one, all_of_them in zip(truth, found, strict=True):
                kept = all_of_them.flatten(0, -3)[i]
                torch.testing.assert_close(kept, one, rtol=1e-10, atol=1e-12)
    # The control: the size of the rows follows the length.
    short, long = (
        METHOD.factors_from(lefts[-1] * k, rights[-1], SCALING, energies[-1], torch.full((1,), k))[
            0
        ]
        for k in (1.0, 1e6)
    )
    assert not torch.allclose(short, long)
