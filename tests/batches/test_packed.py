"""Packed rows and padding-free batches: sequences are cut, held back and counted one by one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lorainit
from lorainit.data.batch import Batch
from lorainit.data.sampling import draw_sample
from tests.batches.same import collected, difference, start_difference, started
from tests.statistics.models import VOCABULARY, llama

Row = dict[str, Any]


def examples(count: int, longest: int = 6, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, longest + 1, (count,), generator=generator).tolist()
    return [
        {"input_ids": ids, "labels": ids.clone()}
        for ids in (torch.randint(3, VOCABULARY, (1, n), generator=generator) for n in sizes)
    ]


def packed(rows: list[Row], kind: str = "position_ids") -> Row:
    """One row of several sequences, as TRL's padding-free collator lays them out."""
    lengths = torch.tensor([row["input_ids"].shape[1] for row in rows])
    ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    batch = {key: torch.cat([row[key] for row in rows], dim=1) for key in ("input_ids", "labels")}
    batch["position_ids"] = torch.cat([torch.arange(int(n)) for n in lengths])[None]
    if kind == "cu_seq_lens":
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        batch |= {"max_length_q": int(lengths.max()), "max_length_k": int(lengths.max())}
        batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, -100)
    if kind == "four-dimensional mask":
        index = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        same = (index[:, None] == index[None]).tril()
        batch["attention_mask"] = same[None, None]
    return batch


def stacked(rows: list[Row]) -> Row:
    """Packed rows padded to one length."""
    length = max(row["input_ids"].shape[1] for row in rows)
    found: Row = {}
    for key, fill in (("input_ids", 0), ("labels", -100), ("position_ids", 0)):
        found[key] = torch.cat(
            [
                torch.nn.functional.pad(r[key], (0, length - r[key].shape[1]), value=fill)
                for r in rows
            ]
        )
    return found


KINDS = ["position_ids", "cu_seq_lens", "four-dimensional mask"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cap_inside_a_row_takes_whole_sequences(kind: str) -> None:
    rows = examples(10)
    data = [packed(rows[:6], kind), packed(rows[6:], kind)]
    for cap in (2, 6, 8):
        sample = draw_sample(data, cap)
        assert sample.sequences == cap
        single = collected(llama(), rows[:cap])
        assert difference(collected(llama(), data, max_sequences=cap), single) < 1e-5
    assert difference(collected(llama(), data, max_sequences=8), collected(llama(), rows)) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_held_back_share_is_of_sequences(kind: str) -> None:
    rows = examples(12)
    data = [packed(rows[:7], kind), packed(rows[7:], kind)]
    assert start_difference(started(llama, data), started(llama, rows)) < 1e-5
    other = [packed(rows[:5], kind), packed(rows[5:7], kind)]
    assert start_difference(started(llama, other), started(llama, rows)) > 1e-3


@pytest.mark.parametrize("count", [(10, 160), (20, 100)])
def test_long_packed_rows_leave_enough_to_hold_back(count: tuple[int, int]) -> None:
    """The cap of 256 sequences once left one row of all ten."""
    number, each = count
    rows = examples(number * each, longest=3)
    data = [packed(rows[i * each : (i + 1) * each]) for i in range(number)]
    sample = draw_sample(data, 256)
    assert sample.sequences == 256
    kept, held = sample.held_back(0.2)
    assert (kept.sequences, held.sequences) == (205, 51)
    ids = [row for part in (kept, held) for b in part.batches for row in b.content["input_ids"]]
    assert sum(map(len, ids)) == sum(row["input_ids"].shape[1] for row in rows[:256])


def test_several_packed_rows_a_batch() -> None:
    rows = examples(12, longest=3)
    data = [stacked([packed(rows[:4]), packed(rows[4:8])]), stacked([packed(rows[8:])])]
    assert difference(collected(llama(), data), collected(llama(), rows)) < 1e-5
    capped = collected(llama(), data, max_sequences=6)
    assert difference(capped, collected(llama(), rows[:6])) < 1e-5
    tight = collected(llama(), data, max_memory="1GiB")
    assert difference(tight, collected(llama(), rows)) < 1e-5


def loader(samples: list[Row], size: int, collate: Any) -> DataLoader[Any]:
    return DataLoader(samples, batch_size=size, collate_fn=collate)  # type: ignore[arg-type]


def test_the_population_is_of_sequences() -> None:
    """15 packed rows of 40 sequences; 40 samples laid into padding-free batches; 40 padded rows."""
    rows = examples(40, longest=4)
    sizes = [3] * 10 + [2] * 5
    bounds = [sum(sizes[:i]) for i in range(16)]
    packs = [packed(rows[a:b]) for a, b in itertools.pairwise(bounds)]
    packs_of_four = loader(packs, 4, stacked)
    padding_free = loader(rows, 4, packed)
    for data in (packs_of_four, padding_free):
        for cap in (None, 8):
            population = draw_sample(data, cap).population
            # Three a row, where only the first rows have been seen.
            assert population == (45 if data is packs_of_four and cap else 40)
    assert packs_of_four.dataset is not None
    assert len(packs) == 15
    assert draw_sample(loader(packs, 1, lambda one: one[0]), None).population == 40
    with_rows = loader(rows, 1, lambda one: one[0])
    assert draw_sample(with_rows, 3).population == 40


def test_statistics_say_the_population_in_sequences() -> None:
    rows = examples(12, longest=4)
    packs = [packed(rows[i : i + 3]) for i in range(0, 12, 3)]
    found = collected(llama(), loader(packs, 1, lambda one: one[0]))
    assert found.metadata["population"] == found.metadata["sequences"] == 12


def test_axes_of_positions_in_front() -> None:
    """``position_ids`` of ``(3, B, T)``: also where B is 3, and its shape tells nothing."""
    for count in (2, 3, 4):
        ids = torch.arange(count * 5).reshape(count, 5)
        axes = torch.stack([100 + ids, 200 + ids, 300 + ids])
        batch = Batch({"input_ids": ids, "position_ids": axes, "labels": ids})
        assert batch.units == count
        for row, part in enumerate(batch.cut(1)):
            assert torch.equal(part.content["position_ids"], axes[:, row : row + 1])
        (last,) = batch.take([False] * (count - 1) + [True])
        assert torch.equal(last.content["position_ids"], axes[:, -1:])


def held(data: list[Row]) -> list[Tensor]:
    _, back = draw_sample(data, None).held_back(0.5)
    return [b.content["input_ids"] for b in back.batches]


def test_the_sequences_that_are_held_back_do_not_depend_on_the_packing() -> None:
    rows = examples(8)
    one = torch.cat([x.flatten() for x in held([packed(rows)])])
    other = torch.cat([x.flatten() for x in held([packed(rows[:3]), packed(rows[3:])])])
    single = torch.cat([x.flatten() for x in held(rows)])
    assert torch.equal(one, single)
    assert torch.equal(other, single)


def test_lora_da_reads_the_same_population() -> None:
    rows = examples(12, longest=4)
    packs = [packed(rows[i : i + 3]) for i in range(0, 12, 3)]
    one = loader(packs, 1, lambda one: one[0])
    single = loader(rows, 1, lambda one: one[0])
    method = lorainit.LoraDA()
    assert start_difference(started(llama, one, method), started(llama, single, method)) < 1e-4
