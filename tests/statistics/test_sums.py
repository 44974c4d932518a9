"""Running sums and masks, over shapes, dtypes and partitions that nobody thought of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorainit.data.batch import Batch
from lorainit.data.sampling import arriving, take_sequences
from lorainit.errors import DataError
from lorainit.statistics.collect import accumulators
from lorainit.statistics.collect.accumulators import (
    InputSums,
    LayerSums,
    add_product,
    add_squares,
    add_sum,
    sum_dtype,
)
from lorainit.statistics.memory.peak import LiveBytes
from lorainit.statistics.positions.counted import (
    CountedPositions,
    label_positions,
    positions_of,
    up_to_the_last_label,
)
from tests.statistics import models

CPU = torch.device("cpu")
quick = settings(max_examples=40, deadline=None)

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-5,
    torch.float16: 1e-5,
}


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    # Half-precision operands are rounded already; their products are summed wide.
    scale = max(float(expected.abs().max()), 1e-30) if expected.numel() else 1.0
    assert found.dtype == sum_dtype(dtype)
    assert float((found.double() - expected).abs().max()) <= TOLERANCES[dtype] * scale * 50


@quick
@given(
    parts=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    columns=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_sums_do_not_depend_on_the_parts(
    parts: list[int], columns: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    left, right = (matrix(sum(parts), c, dtype, seed + i) for i, c in enumerate(columns))
    product = squares = total = None
    for a, b in zip(left.split(parts), right.split(parts), strict=True):
        product = add_product(product, a, b)
        squares = add_squares(squares, a)
        total = add_sum(total, a)
    assert product is not None
    assert squares is not None
    assert total is not None
    wide = left.double()
    close(product, wide.mT @ right.double(), dtype)
    close(squares, wide.square().sum(0), dtype)
    close(total, wide.sum(0), dtype)


@quick
@given(
    rows=st.integers(1, 6),
    columns=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dtype=DTYPES,
    scale=st.sampled_from([1.0, 2.0**12]),
)
def test_the_loss_scale_is_taken_out(
    rows: int, columns: tuple[int, int], dtype: torch.dtype, scale: float
) -> None:
    g, x = (matrix(rows, c, dtype, i).double() for i, c in enumerate(columns))
    sums = LayerSums()
    sums.add_gradient(g * scale, x)
    sums.add_output(g * scale, frozenset({"output_second_moment", "output_second_moment_diagonal"}))
    sums.inputs.add(x, frozenset({"input_second_moment", "input_mean"}))
    sums.positions = rows
    layer = sums.finish(
        sequences=2, label_tokens=4, loss_reduction="sequence", loss_scale=scale, population=None
    )
    torch.testing.assert_close(layer.gradient, g.mT @ x / 2)
    torch.testing.assert_close(layer.output_second_moment, g.mT @ g / rows)
    torch.testing.assert_close(layer.output_second_moment_diagonal, (g * g).mean(0))
    torch.testing.assert_close(layer.input_second_moment, x.mT @ x / rows)
    torch.testing.assert_close(layer.input_mean, x.mean(0))


def test_a_copy_of_input_sums_is_its_own() -> None:
    needs = frozenset({"input_second_moment", "input_mean"})
    sums = InputSums()
    sums.add(torch.ones(2, 3), needs)
    copy = sums.clone()
    sums.add(torch.ones(2, 3), needs)
    assert copy.positions == 2
    assert copy.second_moment is not None
    assert copy.second_moment.tolist() == [[2.0] * 3] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_sum_in_bfloat16_needs_no_wide_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows of a product are there at a time; the sum is right to its own digits."""
    rng = torch.Generator().manual_seed(0)
    pairs = [
        (
            torch.randn(16, 256, generator=rng).to(dtype),
            torch.randn(16, 512, generator=rng).to(dtype),
        )
        for _ in range(3)
    ]
    wanted = sum(g.double().mT @ x.double() for g, x in pairs)

    def added() -> tuple[LayerSums, float]:
        sums = LayerSums()
        with LiveBytes() as meter:
            for g, x in pairs:
                sums.add_gradient(g, x, "bfloat16")
        assert sums.gradient is not None
        return sums, meter.peak / (sums.gradient.numel() * 2)

    monkeypatch.setattr(accumulators, "_ROUNDED_AT_ONCE", 4096)
    sums, peak = added()
    assert sums.gradient is not None
    assert sums.gradient.dtype == torch.bfloat16
    off = torch.linalg.norm(sums.gradient.double() - wanted) / torch.linalg.norm(wanted)
    assert 1e-4 < off < 2**-8
    assert peak < 1.6
    monkeypatch.setattr(accumulators, "_ROUNDED_AT_ONCE", 2**20)
    whole, peak = added()
    assert peak > 2.5
    torch.testing.assert_close(whole.gradient, sums.gradient, rtol=2**-7, atol=1e-2)


def test_half_precision_operands_are_summed_wide() -> None:
    """One thousand squares of 16 overflow float16 (65,504) and lose digits in bfloat16."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.full((1000, 2), 16.0, dtype=dtype)
        product, squares = add_product(None, x, x), add_squares(None, x)
        assert product.tolist() == [[256_000.0] * 2] * 2
        torch.testing.assert_close(squares, torch.full((2,), 256_000.0))


# --- masks --------------------------------------------------------------------------------------

MASKS = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 6).flatmap(
        lambda length: st.lists(
            st.lists(st.booleans(), min_size=length, max_size=length),
            min_size=rows,
            max_size=rows,
        )
    )
)


def chosen(x: Tensor, indices: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if indices is None else flat[indices]


@quick
@given(mask=MASKS, leading=st.sampled_from(["plain", "flat", "in front", "between"]))
def test_positions_are_those_of_the_mask(mask: list[list[bool]], leading: str) -> None:
    attends = torch.tensor(mask)
    rows, length = attends.shape
    x = torch.arange(rows * length, dtype=torch.float64).reshape(rows, length, 1)
    shapes = {
        "plain": (rows, length),
        "flat": (rows * length,),
        "in front": (1, 1, rows, length),
        "between": (rows, 1, length),
    }
    positions = positions_of(attends.long(), CPU)
    shape = torch.Size(shapes[leading])
    indices, known = positions.indices_for(shape)
    assert known
    found = chosen(x.reshape(*shape, 1), indices)
    assert torch.equal(found, x[attends])


@quick
@given(mask=MASKS, other=st.tuples(st.integers(1, 4), st.integers(1, 6)))
def test_inputs_that_do_not_lie_like_the_mask_count_whole(
    mask: list[list[bool]], other: tuple[int, int]
) -> None:
    attends = torch.tensor(mask)
    counted = CountedPositions((attends.shape[0], attends.shape[1]), None)
    assert counted.matches(torch.Size(attends.shape))
    if other[0] * other[1] != attends.numel():
        assert not counted.matches(torch.Size(other))


@quick
@given(mask=MASKS)
def test_choices_lie_flat(mask: list[list[bool]]) -> None:
    """Multiple choice: masks are (batch, choices, length), inputs (batch * choices, length)."""
    attends = torch.tensor([mask, mask])
    x = torch.arange(attends.numel(), dtype=torch.float64).reshape(*attends.shape, 1)
    shape = torch.Size((2 * attends.shape[1], attends.shape[2]))
    found = chosen(x.reshape(*shape, 1), positions_of(attends, CPU).indices_for(shape)[0])
    assert torch.equal(found, x[attends])


@quick
@given(mask=MASKS)
def test_label_positions_predict_a_label(mask: list[list[bool]]) -> None:
    labelled = torch.tensor(mask)
    labels = torch.where(labelled, 5, -100)
    positions = label_positions(nn.Identity(), {"labels": labels}, CPU)
    indices, _ = positions.indices_for(torch.Size(labels.shape))
    found = torch.zeros(labels.numel(), dtype=torch.bool)
    found[slice(None) if indices is None else indices] = True
    expected = torch.zeros_like(labelled)
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            expected[row, t] = bool(labelled[row, t + 1])
    assert torch.equal(found.reshape(labels.shape), expected)


def test_a_decoders_positions_end_with_its_labels() -> None:
    labels = torch.tensor([[5, -100, 6, -100], [7, 8, 9, 4]])
    indices, _ = positions_of(up_to_the_last_label(labels), CPU).indices_for(torch.Size((2, 4)))
    assert indices is not None
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7]


# --- batches ------------------------------------------------------------------------------------


@quick
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    cap=st.one_of(st.none(), st.integers(1, 12)),
)
def test_batches_up_to_the_cap(sizes: list[int], cap: int | None) -> None:
    ids = torch.arange(sum(sizes))
    data = [{"input_ids": part[:, None], "labels": part[:, None]} for part in ids.split(sizes)]
    taken = take_sequences(arriving(data), cap)
    found = [batch.content["input_ids"][:, 0] for batch in taken]
    expected = ids if cap is None else ids[:cap]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.long), *found]), expected)


def test_cutting_a_batch_cuts_all_that_has_one_entry_a_row() -> None:
    batch = {
        "input_ids": torch.ones(4, 3),
        "names": ["a", "b", "c", "d"],
        "scale": torch.tensor(2.0),
        "axes": torch.ones(3, 4, 3),
        "position_ids": torch.ones(3, 4, 3),
    }
    (cut,) = take_sequences(arriving([{**batch, "axes": None}]), 3)
    assert cut.content["input_ids"].shape == (3, 3)
    assert cut.content["names"] == ["a", "b", "c"]
    assert float(cut.content["scale"]) == 2
    assert cut.content["position_ids"].shape == (3, 3, 3)
    # What is not one entry a row cannot be cut: the batch is taken as it is.
    (whole,) = take_sequences(arriving([batch]), 3)
    assert whole.units == 1
    assert whole.content["input_ids"].shape == (4, 3)


def test_packed_rows_hold_several_sequences() -> None:
    ids = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]])
    batch = Batch({"input_ids": torch.ones(2, 7).long(), "position_ids": ids})
    assert batch.sequences == batch.units == 3


def test_a_packed_row_is_cut_where_a_sequence_ends() -> None:
    packed = models.pack(models.sequences(4))
    (cut,) = take_sequences(arriving([packed, packed]), 3)
    alone = models.pack(models.sequences(4)[:3])
    assert torch.equal(cut.content["input_ids"], alone["input_ids"])
    assert torch.equal(cut.content["position_ids"], alone["position_ids"])


def test_tensors_move_inside_whatever_holds_them() -> None:
    from collections import namedtuple

    Pair = namedtuple("Pair", "left right")
    held: Any = {"a": [torch.ones(1)], "b": Pair(torch.ones(1), "text"), "c": (torch.ones(1), 3)}
    moved = Batch(held).to(torch.device("meta")).content
    assert moved["a"][0].is_meta
    assert moved["b"].left.is_meta
    assert moved["b"].right == "text"
    assert moved["c"][0].is_meta


def test_labels_masks_need_causal_labels() -> None:
    with pytest.raises(DataError, match="causal"):
        label_positions(models.t5(), {"labels": torch.ones(2, 3).long()}, CPU)
