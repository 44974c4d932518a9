"""A loss function of the user's takes any batch; what belongs together in its eyes is never cut."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BatchEncoding

import lorainit
from lorainit.errors import DataError
from tests.batches.same import collected, difference, start_difference, started
from tests.batches.test_packed import examples
from tests.statistics.models import VOCABULARY, llama

LENGTH = 6


def ids(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)


def log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of each row, ``(rows,)``."""
    logits = model(input_ids=tokens).logits[:, :-1]
    found = F.cross_entropy(logits.mT.float(), tokens[:, 1:], reduction="none")
    return -found.sum(-1)


def dpo(model: nn.Module, batch: Any) -> Tensor:
    """One loss a pair, of ``[chosen; rejected]`` rows."""
    chosen, rejected = log_probabilities(model, batch["input_ids"]).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected) - batch["reference"].chunk(2)[0])


def pairs(count: int = 10) -> list[dict[str, Tensor]]:
    """Single pairs, each with its own reference."""
    chosen, rejected = ids(count), ids(count, 1)
    return [
        {
            "input_ids": torch.stack([chosen[i], rejected[i]]),
            "reference": torch.full((2,), 0.1 * i),
        }
        for i in range(count)
    ]


def joined(some: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """``[chosen; rejected]``."""
    found = {key: torch.stack([pair[key] for pair in some], dim=1) for key in some[0]}
    return {key: value.flatten(0, 1) for key, value in found.items()}


def by_two(some: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [joined(some[i : i + 2]) for i in range(0, len(some), 2)]


class TestPairs:
    def test_a_cap_is_of_pairs_and_cuts_none(self, caplog: pytest.LogCaptureFixture) -> None:
        single = pairs()
        truth = collected(llama(), single[:4], loss_fn=dpo)
        with caplog.at_level(logging.INFO, logger="lorainit"):
            found = collected(llama(), by_two(single), loss_fn=dpo, max_sequences=4)
        assert "belong together" in caplog.text
        assert found.metadata["sequences"] == 4
        assert difference(found, truth) < 1e-5
        # What was done once: two rows of the first batch, chosen against chosen.
        batch = joined(single[:2])
        wrong = [{key: value[:2] for key, value in batch.items()}]
        other = collected(llama(), wrong, loss_fn=dpo)
        assert difference(other, collected(llama(), single[:1], loss_fn=dpo)) > 0.1

    def test_memory_cuts_none(self) -> None:
        single = pairs()
        found = collected(llama(), by_two(single), loss_fn=dpo, max_memory="1GiB")
        assert difference(found, collected(llama(), single, loss_fn=dpo)) < 1e-5

    def test_whole_batches_are_held_back(self) -> None:
        """Every fifth batch of two pairs, of five; every fifth pair of ten, in an order that fits."""
        batches = by_two(pairs(20))
        order = [*range(0, 4), *range(4, 8)]
        shuffled = [batches[i] for i in order] + batches[8:]
        first = started(llama, shuffled, loss_fn=dpo)
        second = started(llama, [dict(b) for b in batches], loss_fn=dpo)
        assert start_difference(first, second) == 0
        kept = collected(llama(), [b for i, b in enumerate(batches) if i % 5 != 4], loss_fn=dpo)
        assert kept.metadata["sequences"] == 16


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    """As many losses as rows, each of which compares its row with the others."""
    states = model(input_ids=batch["input_ids"]).logits.float().mean(1)
    return F.cross_entropy(states @ states.mT, torch.arange(len(states)), reduction="none")


def test_rows_that_are_compared_with_each_other_are_not_cut() -> None:
    data = [{"input_ids": ids(4, seed)} for seed in range(3)]
    capped = collected(llama(), data, loss_fn=contrastive, max_sequences=8)
    assert difference(capped, collected(llama(), data[:2], loss_fn=contrastive)) == 0
    found = collected(llama(), data, loss_fn=contrastive, max_sequences=6)
    assert found.metadata["sequences"] == 4
    # The negative control: rows of a loss that compares nothing are cut.
    apart = collected(llama(), data, loss_fn=causal, max_sequences=6)
    assert apart.metadata["sequences"] == 6


def causal(model: nn.Module, batch: Any) -> Tensor:
    return -log_probabilities(model, batch["input_ids"])


@dataclass(frozen=True)
class Pair:
    input_ids: Tensor
    note: str = ""


class Named(NamedTuple):
    input_ids: Tensor
    note: str


def tokens_of(batch: Any) -> Tensor:
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return batch[0]
    if isinstance(batch, Pair | Named):
        return batch.input_ids
    return batch["nested"]["input_ids"]


FORMS = {
    "tuple": lambda t: (t, "a"),
    "list": lambda t: [t, None],
    "dataclass": Pair,
    "named tuple": lambda t: Named(t, "a"),
    "nested dictionary": lambda t: {"nested": {"input_ids": t}, "name": "a"},
    "nested encoding": lambda t: {"nested": BatchEncoding({"input_ids": t})},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", [None, lorainit.EVA(rho=1)])
def test_batches_of_any_type(form: str, method: Any) -> None:
    """What each holds is one unit, of as many sequences as it has losses."""
    tokens = [ids(3, seed) for seed in range(6)]
    plain = [{"input_ids": t} for t in tokens]
    other = [FORMS[form](t) for t in tokens]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return causal(model, {"input_ids": tokens_of(batch)})

    if method is None:
        found = collected(llama(), other, loss_fn=loss)
        assert found.metadata["sequences"] == 18
        assert difference(found, collected(llama(), plain, loss_fn=causal)) < 1e-5
        capped = collected(llama(), other, loss_fn=loss, max_sequences=7)
        assert capped.metadata["sequences"] == 6
        with pytest.raises(DataError, match=r"dictionary|no tensors"):
            collected(llama(), other)
    found = started(llama, other, method, loss_fn=loss)
    assert all(bool(torch.isfinite(x).all()) for x in found.values())


def test_one_number_is_the_loss_of_a_batch_that_is_no_dictionary() -> None:
    data = [(ids(1, seed),) for seed in range(4)]
    found = collected(llama(), data, loss_fn=lambda m, b: causal(m, {"input_ids": b[0]}).mean())
    assert found.metadata["sequences"] == 4
    plain = collected(llama(), [{"input_ids": b[0]} for b in data], loss_fn=causal)
    assert difference(found, plain) < 1e-5
    with pytest.raises(DataError, match="one loss per sequence"):
        collected(
            llama(), [{"input_ids": b[0]} for b in data], loss_fn=lambda m, b: causal(m, b).mean()
        )


def test_the_user_s_batch_stays_as_it_is() -> None:
    batch = {"nested": {"input_ids": ids(2)}, "pair": Pair(ids(2))}
    seen = []

    def loss(model: nn.Module, given: Any) -> Tensor:
        seen.append(given)
        return causal(model, given["nested"])

    collected(llama(), [batch], loss_fn=loss)
    assert isinstance(seen[-1]["pair"], Pair)
    assert batch["nested"] is not seen[-1]["nested"]


class TestRows:
    def test_rows_without_a_batch_axis(self) -> None:
        """What ``Dataset.with_format("torch")`` gives."""
        datasets = pytest.importorskip("datasets")
        rows = examples(6)
        records = [{k: v[0].tolist() for k, v in row.items()} for row in rows]
        data = datasets.Dataset.from_list(records).with_format("torch")
        assert difference(collected(llama(), data), collected(llama(), rows)) < 1e-6

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
    def test_labels_in_fewer_bits(self, dtype: torch.dtype) -> None:
        rows = examples(4)
        narrow = [row | {"labels": row["labels"].to(dtype)} for row in rows]
        narrow[0]["input_ids"] = narrow[0]["input_ids"].to(dtype)
        assert difference(collected(llama(), narrow), collected(llama(), rows)) == 0

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("input_ids", "batch 1 has the token 37 in 'input_ids'"),
            ("labels", "batch 1 has the label 37"),
        ],
    )
    @pytest.mark.parametrize("settings", [{}, {"max_memory": "1GiB"}])
    def test_what_the_model_does_not_know_is_named(
        self, key: str, message: str, settings: dict[str, Any]
    ) -> None:
        rows = examples(3)
        rows[1][key][0, 2] = VOCABULARY
        with pytest.raises(DataError, match=message) as caught:
            collected(llama(), rows, **settings)
        assert "\n" not in str(caught.value)

    def test_other_errors_stay_as_they_are(self) -> None:
        def broken(model: nn.Module, batch: Any) -> Tensor:
            raise IndexError("my own")

        with pytest.raises(IndexError, match="my own"):
            collected(llama(), examples(2), loss_fn=broken)
