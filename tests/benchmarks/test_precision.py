"""What the study counts and compares."""

from __future__ import annotations

import torch
from benchmarks.studies.precision.products import Products, made_up

from lorainit.linalg import leading, subspace_iteration
from lorainit.methods import LoraDA


def test_products_are_counted_and_the_iteration_is_put_back() -> None:
    matrix = torch.randn(900, 900, generator=torch.Generator().manual_seed(0))
    before = subspace_iteration.filtered
    counts = []
    for each in (0.0, 0.1):
        with Products() as products:
            leading._filtered_svd(matrix, 4, 2e-6, each)
        counts.append(products.count)
    assert counts[0] > counts[1] > 1
    assert subspace_iteration.filtered is before


def test_made_up_statistics_are_what_their_names_say() -> None:
    """The gradient of noise alone is far shorter; inputs fall by a factor of thirty."""
    lengths = {}
    for kind in ("flat", "falling", "noise"):
        found = made_up(kind, inputs=64, outputs=96, tokens=4096)
        LoraDA()._fisher(found)
        sizes = found.input_second_moment.diagonal().sqrt()
        assert (float(sizes[0] / sizes[-1]) > 20) == (kind != "flat")
        lengths[kind] = float(found.gradient.norm())
    assert lengths["noise"] < 0.5 * min(lengths["flat"], lengths["falling"])
