"""Bad input and accidents: the error that each gets, and that nothing is lost or half installed."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lorainit
from lorainit import errors
from lorainit.statistics.store import sharded_files
from tests.statistics import models
from tests.statistics.models import Batch, all_linear, batches, sequences
from tests.untouched import snapshot, unsettle, untouched

ROWS = sequences(6)
NEEDS = lorainit.LoraDA().needs
LAYER = "model.layers.0.self_attn.q_proj"


def model() -> Any:
    return unsettle(models.llama())


def good() -> list[Batch]:
    return batches(ROWS, 2)


def collected(config: LoraConfig | None = None, **settings: Any) -> lorainit.Statistics:
    settings.setdefault("needs", NEEDS)
    return lorainit.collect_statistics(
        models.llama(), config or all_linear(), data=good(), progress=False, **settings
    )


def install(base: nn.Module, config: Any = None, **settings: Any) -> PeftModel:
    settings.setdefault("method", lorainit.LoraDA())
    if "statistics" not in settings:
        settings.setdefault("data", good())
    return lorainit.get_peft_model(base, config or all_linear(), progress=False, **settings)


def wanting(**settings: Any) -> Callable[[nn.Module], Any]:
    return lambda base: install(base, **settings)


# --- bad input ----------------------------------------------------------------------------------


def masked() -> list[Batch]:
    return [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in good()]


def labelled_only_at_the_first_token() -> list[Batch]:
    """Labels, none of which a causal model can predict."""
    data = masked()
    for batch in data:
        batch["labels"][:, 0] = batch["input_ids"][:, 0]
    return data


def without_labels(index: int) -> list[Batch]:
    data = good()
    del data[index]["labels"]
    return data


def exhausted() -> Iterator[Batch]:
    data = iter(good())
    list(data)
    return data


def empty_batches() -> list[Batch]:
    nothing = torch.zeros(0, 4, dtype=torch.long)
    return [
        {"input_ids": nothing, "labels": nothing},
        {"input_ids": nothing.reshape(2, 0), "labels": nothing.reshape(2, 0)},
    ]


class HalfUsed(nn.Module):
    """A layer that no forward reaches beside one that all reach."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, reach: str = "used") -> Tensor:
        return {"used": self.used, "neither": torch.nn.Identity()}[reach](x)[..., :3]


def half_used(targets: list[str], reach: str, **settings: Any) -> Callable[[nn.Module], Any]:
    base = unsettle(HalfUsed())
    data = [{"x": torch.randn(4, 5), "labels": torch.arange(4) % 3, "reach": reach}]

    def act(_: nn.Module) -> None:
        with untouched(base):
            install(base, LoraConfig(r=2, target_modules=targets), data=data, **settings)

    return act


ALL_MASKED = ["every label is masked", "-100", "collator"]
UNREACHED = ["do not depend|does not depend", "target"]

BAD_INPUT: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], list[str]]] = {
    "unknown target modules": (
        wanting(config=LoraConfig(target_modules=["nothing_like_it"])),
        errors.TargetError,
        ["nothing_like_it", "match no module", "all-linear"],
    ),
    "targets that are not linear": (
        wanting(config=LoraConfig(target_modules=["input_layernorm"])),
        errors.TargetError,
        ["input_layernorm", "is not a linear layer"],
    ),
    "rank above the layer's own": (
        wanting(config=LoraConfig(r=9, target_modules="all-linear"), on_unused="raise"),
        errors.RankError,
        [r"model.layers.0.self_attn.k_proj", "rank 9", r"min\(out, in\) = 8", "cap_rank=True"],
    ),
    "peft_config of another kind": (
        wanting(config={"r": 8}),
        errors.AdapterError,
        ["peft.LoraConfig", "dict"],
    ),
    "peft_config of another method": (
        wanting(config=peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
        errors.AdapterError,
        ["peft.LoraConfig", "IA3Config"],
    ),
    "no peft_config": (
        lambda base: lorainit.get_peft_model(base, None, method=lorainit.LoraDA(), data=good()),
        errors.AdapterError,
        ["peft_config is None", "Pass a peft.LoraConfig"],
    ),
    "a method's class": (
        wanting(method=lorainit.LoraDA),
        errors.AdapterError,
        [r"such as LoraDA\(\)"],
    ),
    "a method's name": (
        wanting(method="lora_da"),
        errors.AdapterError,
        [r"lorainit.LoraDA\(\)", "str"],
    ),
    "neither data nor statistics": (
        wanting(data=None),
        errors.MissingStatisticError,
        ["LoraDA", "gradient", "input_second_moment", "data=...", "statistics=..."],
    ),
    "one dictionary as data": (
        wanting(data=models.pad(ROWS)),
        errors.DataError,
        ["iterable of batches, not a dict"],
    ),
    "a path as statistics": (
        wanting(statistics="target.safetensors"),
        errors.StatisticsFileError,
        ["not a str", r"Statistics.load\(path\)"],
    ),
    "empty data": (wanting(data=[]), errors.DataError, ["no sequences", "empty"]),
    "exhausted generator": (
        lambda base: install(base, data=exhausted()),
        errors.DataError,
        ["no sequences", "exhausted"],
    ),
    "batches without rows or tokens": (
        wanting(data=empty_batches()),
        errors.DataError,
        ["no sequences"],
    ),
    "batches that are tuples": (
        wanting(data=[(torch.ones(2, 3), torch.ones(2))]),
        errors.DataError,
        ["batch 0 is a tuple", "collate"],
    ),
    "batches without tensors": (
        wanting(data=[{"text": ["a", "b"]}]),
        errors.DataError,
        ["no tensors", "text"],
    ),
    "data that are no iterable": (wanting(data=7), errors.DataError, ["iterable", "int"]),
    "all labels masked": (wanting(data=masked()), errors.DataError, ALL_MASKED),
    "labels nowhere but at the first token": (
        wanting(data=labelled_only_at_the_first_token()),
        errors.DataError,
        ALL_MASKED,
    ),
    "labels missing": (wanting(data=without_labels(0)), errors.DataError, ["'labels'", "loss_fn"]),
    "labels missing late": (
        wanting(data=without_labels(2)),
        errors.DataError,
        ["'labels'", "batch 2|a batch", "loss_fn"],
    ),
    "label positions of a model without them": (
        lambda base: lorainit.collect_statistics(
            models.bert(head="SequenceClassification"),
            all_linear(),
            data=models.classified(ROWS, 2, 2),
            needs=NEEDS,
            token_mask="labels",
        ),
        errors.DataError,
        ["causal", "token_mask='attention'"],
    ),
    "no target ran": (half_used(["idle"], "used"), errors.TargetError, UNREACHED),
    "one target never ran": (
        half_used(["idle", "used"], "used", on_unused="raise"),
        errors.TargetError,
        ["'idle'", "exclude_modules", "on_unused='default'"],
    ),
    "a loss without a graph": (
        wanting(loss_fn=lambda base, batch: torch.ones(len(batch["labels"]))),
        errors.TargetError,
        UNREACHED,
    ),
    "a loss of one number": (
        wanting(loss_fn=lambda base, batch: base(**batch).loss),
        errors.DataError,
        ["one loss per sequence", r"\(\)"],
    ),
    "a loss of every token": (
        wanting(loss_fn=lambda base, batch: base(**batch).logits.sum(-1).reshape(-1)),
        errors.DataError,
        ["one loss per sequence", "2 sequences"],
    ),
    "an unknown statistic": (
        lambda base: lorainit.collect_statistics(
            base, all_linear(), data=good(), needs={"gradients"}
        ),
        ValueError,
        ["gradients", "input_second_moment"],
    ),
    "no statistic": (
        lambda base: lorainit.collect_statistics(base, all_linear(), data=good(), needs=()),
        ValueError,
        ["needs", "gradient"],
    ),
    "an unknown mask": (wanting(token_mask="all"), ValueError, ["token_mask", "'attention'"]),
    "an unknown reduction": (wanting(loss_reduction="mean"), ValueError, ["loss_reduction"]),
    "a cap of nothing": (wanting(max_sequences=0), ValueError, ["max_sequences", "at least 1"]),
    "an adapter name with a dot": (
        wanting(adapter_name="my.adapter"),
        errors.AdapterError,
        ["my.adapter", "adapter_name"],
    ),
    "an adapter name that is taken by torch": (
        wanting(adapter_name="keys"),
        errors.AdapterError,
        ["keys", "adapter_name"],
    ),
    "an empty adapter name": (wanting(adapter_name=""), errors.AdapterError, ["adapter_name"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    act, kind, words = BAD_INPUT[case]
    base = model()
    with untouched(base), pytest.raises(kind) as caught:
        act(base)
    for word in words:
        assert caught.match(word)
    assert len(str(caught.value)) < 700


BEFORE_ANY_WORK = [
    "unknown target modules",
    "rank above the layer's own",
    "a method's class",
    "neither data nor statistics",
    "all labels masked",
    "labels missing late",
    "an unknown reduction",
    "an adapter name with a dot",
]


@pytest.mark.parametrize("case", BEFORE_ANY_WORK)
def test_bad_input_is_found_before_any_work(case: str) -> None:
    act, kind, _ = BAD_INPUT[case]
    base = model()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    base.register_forward_hook(count)
    with pytest.raises(kind):
        act(base)
    assert calls == 0


def test_what_was_never_reached_may_be_left_at_pefts_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = [{"x": torch.randn(4, 5), "labels": torch.arange(4) % 3}]
    config = LoraConfig(r=2, target_modules=["idle", "used"])
    with caplog.at_level(logging.INFO, logger="lorainit"):
        wrapped = install(HalfUsed(), config, data=data)
    assert "idle: no sequence reached it" in caplog.text
    assert not wrapped.get_base_model().idle.lora_B["default"].weight.any()
    assert wrapped.get_base_model().used.lora_B["default"].weight.any()


def test_zero_length_batches_among_others_are_passed_over() -> None:
    found = lorainit.collect_statistics(
        models.llama(),
        all_linear(),
        data=[*empty_batches(), *good(), *empty_batches()],
        needs=NEEDS,
        progress=False,
    )
    assert torch.equal(found[LAYER].gradient, collected()[LAYER].gradient)


# --- losses that are not finite -------------------------------------------------------------------


class Spoiled(nn.Module):
    """A model whose logits are NaN for sequences that hold the token `poison`."""

    poison = 2

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inner = models.llama(dtype)

    def forward(self, **batch: Any) -> Any:
        outputs = self.inner(**batch)
        bad = (batch["input_ids"] == self.poison).any(-1)
        outputs.logits = outputs.logits.masked_fill(bad[:, None, None], float("nan"))
        return outputs


def poisoned(index: int) -> list[Batch]:
    data = good()
    data[index]["input_ids"][1, 0] = Spoiled.poison
    return data


def test_a_loss_that_is_not_finite_names_batch_and_sequence() -> None:
    base = unsettle(Spoiled())
    with untouched(base), pytest.raises(errors.NonFiniteError) as caught:
        install(base, data=poisoned(1))
    for word in ("batch 1", r"sequences \[1\]", "on_nonfinite='skip'", "bfloat16"):
        assert caught.match(word)


class SpoiledInside(Spoiled):
    """The same from its first layer on, so that statistics without a loss are spoiled as well."""

    def forward(self, **batch: Any) -> Any:
        bad = (batch["input_ids"] == self.poison).any(-1)
        embeddings = self.inner.get_input_embeddings()

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output.masked_fill(bad[:, None, None], float("nan"))

        handle = embeddings.register_forward_hook(hook)
        try:
            return self.inner(**batch)
        finally:
            handle.remove()


def clean(batch: Batch) -> Batch:
    good_rows = ~(batch["input_ids"] == Spoiled.poison).any(-1)
    return {key: value[good_rows] for key, value in batch.items()}


SKIPPING: dict[str, tuple[type[Spoiled], Any]] = {
    "a loss": (Spoiled, NEEDS),
    "from the first layer on": (SpoiledInside, NEEDS),
    "no loss to look at": (SpoiledInside, lorainit.EVA().needs),
}


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("case", SKIPPING)
def test_sequences_that_are_not_finite_may_be_skipped_and_are_counted(
    case: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    kind, needs = SKIPPING[case]
    settings: Any = {"needs": needs, "progress": False}
    data = batches(ROWS, size)
    for row in (1, 4):
        data[row // size]["input_ids"][row % size, 0] = Spoiled.poison
    with caplog.at_level(logging.WARNING, logger="lorainit"):
        found = lorainit.collect_statistics(
            kind(), all_linear(), data=data, on_nonfinite="skip", **settings
        )
    expected = lorainit.collect_statistics(
        kind(), all_linear(), data=[clean(batch) for batch in data], **settings
    )
    for name, layer in expected.items():
        for field in layer.available:
            torch.testing.assert_close(getattr(found[name], field), getattr(layer, field))
        assert found[name].sequences == layer.sequences == 4
        assert found[name].positions == layer.positions
    assert found.metadata["skipped_sequences"] == 2
    for row in (1, 4):
        batch, places = row // size, [r % size for r in (1, 4) if r // size == row // size]
        assert f"batch {batch}: its sequences {places} skipped" in caplog.text

    with pytest.raises(
        errors.NonFiniteError, match=rf"batch {1 // size} is not finite \(sequences"
    ):
        lorainit.collect_statistics(kind(), all_linear(), data=data, **settings)


def test_skipping_nothing_changes_nothing() -> None:
    """The control of the above: with the policy or without, the same bits."""
    plain, skipping = collected(), collected(on_nonfinite="skip")
    for name, layer in plain.items():
        assert torch.equal(layer.gradient, skipping[name].gradient)
    assert skipping.metadata["skipped_sequences"] == 0


@pytest.mark.parametrize("packed", [True, False])
def test_what_cannot_be_told_apart_is_skipped_together(
    packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Sequences packed into one row; tensors that are not one entry a sequence."""
    data = poisoned(1)
    if packed:
        for batch in data:
            rest = torch.arange(batch["input_ids"].shape[1] - 2)
            batch["position_ids"] = torch.cat([torch.arange(2), rest]).expand(2, -1)
    else:
        data[1]["images"] = torch.zeros(7, 2)

    class Takes(Spoiled):
        def forward(self, images: Any = None, **batch: Any) -> Any:
            return super().forward(**batch)

    with caplog.at_level(logging.WARNING, logger="lorainit"):
        found = lorainit.collect_statistics(
            Takes(),
            all_linear(),
            data=data,
            needs=NEEDS,
            on_nonfinite="skip",
            progress=False,
        )
    assert found.metadata["skipped_sequences"] == 2
    assert ("its sequences [2, 3] skipped" if packed else "batch 1 skipped") in caplog.text
    # One row of two packed sequences, or the whole batch, is gone; the rest is there.
    rest = lorainit.collect_statistics(
        Takes(),
        all_linear(),
        data=[data[0], *([clean(data[1])] if packed else []), data[2]],
        needs=NEEDS,
        progress=False,
    )
    for name, layer in rest.items():
        torch.testing.assert_close(found[name].gradient, layer.gradient)


def test_skipping_everything_is_an_error() -> None:
    base = unsettle(Spoiled())
    data = poisoned(0)[:1]
    data[0]["input_ids"][:, 0] = Spoiled.poison
    with untouched(base), pytest.raises(errors.NonFiniteError, match="every sequence"):
        install(base, data=data, on_nonfinite="skip")


def test_sums_that_overflow_name_the_layer() -> None:
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.big = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.big(x * 1e25))

    base = unsettle(Huge())
    data = [{"x": torch.randn(4, 4), "labels": torch.arange(4) % 3}]
    with untouched(base), pytest.raises(errors.NonFiniteError, match=r"layer 'big'.*not finite"):
        install(base, LoraConfig(r=2, target_modules=["big"]), data=data)


# --- accidents ----------------------------------------------------------------------------------


class Accident(Exception):
    """The user's own."""


class Boom(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: BaseException) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ctx.error


def failing_data(base: nn.Module, error: BaseException) -> dict[str, Any]:
    def draw() -> Iterator[Batch]:
        yield good()[0]
        torch.rand(3), random.random(), numpy.random.rand()  # noqa: NPY002
        raise error

    return {"data": draw()}


def failing_collator(base: nn.Module, error: BaseException) -> dict[str, Any]:
    def collate(rows: list[Batch]) -> Batch:
        torch.rand(3)
        raise error

    return {"data": torch.utils.data.DataLoader(ROWS, 2, shuffle=True, collate_fn=collate)}


def failing_loss(base: nn.Module, error: BaseException) -> dict[str, Any]:
    calls = []

    def loss(base: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        calls.append(1)
        torch.rand(3)
        if len(calls) == 2:
            raise error
        losses: Tensor = base(**batch).logits.sum((1, 2))
        return losses

    return {"loss_fn": loss}


def failing_forward(base: nn.Module, error: BaseException) -> dict[str, Any]:
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error

    base.get_submodule("model.layers.1.mlp").register_forward_hook(hook)
    return {}


def failing_backward(base: nn.Module, error: BaseException) -> dict[str, Any]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        result: Tensor = Boom.apply(output, error)
        return result

    base.get_submodule("model.layers.0.mlp").register_forward_hook(hook)
    return {}


PLACES = [failing_data, failing_collator, failing_loss, failing_forward, failing_backward]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("error", [Accident("mine"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_an_accident_leaves_the_model_as_it_was(
    place: Callable[..., dict[str, Any]], error: BaseException, checkpointing: bool
) -> None:
    base = models.llama()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    unsettle(base)
    settings = place(base, error)
    with untouched(base), pytest.raises(type(error)) as caught:
        install(base, **settings)
    assert caught.value is error, "the user's own exception comes through as it is"


def test_collecting_leaves_the_model_as_it_was() -> None:
    base = model()
    loader = torch.utils.data.DataLoader(ROWS, 2, shuffle=True, collate_fn=models.pad)
    with untouched(base):
        lorainit.collect_statistics(base, all_linear(), data=loader, needs=NEEDS, progress=False)


@pytest.mark.parametrize("reentrant", [True, False])
def test_collecting_under_checkpointing_leaves_the_model_as_it_was(reentrant: bool) -> None:
    base = models.whisper(dropout=0.3, encoder_layerdrop=0.2)
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    unsettle(base.train())
    data = [{"input_features": torch.randn(2, 8, 20), "labels": torch.arange(3, 13).view(2, 5)}]
    with untouched(base):
        lorainit.collect_statistics(base, all_linear(), data=data, needs=NEEDS, progress=False)


@pytest.mark.parametrize("method", [lorainit.LoraDA(), lorainit.FILet()], ids=str)
def test_installing_draws_what_peft_draws_and_moves_no_weight(method: Any) -> None:
    base = models.llama()
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    torch.manual_seed(5)
    wrapped = install(base, method=method)
    after = torch.get_rng_state()
    other = models.llama()
    torch.manual_seed(5)
    peft.get_peft_model(other, all_linear())
    assert torch.equal(torch.get_rng_state(), after)
    inner = dict(wrapped.get_base_model().named_parameters())
    for name, weight in weights.items():
        found = inner.get(name)
        if found is None:
            stem, _, leaf = name.rpartition(".")
            found = inner[f"{stem}.base_layer.{leaf}"]
        assert torch.equal(found, weight), name


# --- accidents while installing -------------------------------------------------------------------


class BadMethod:
    """A method of the user's own that raises, or gives factors of a wrong shape."""

    needs = frozenset({"gradient"})

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def solve(self, weight: Tensor, statistics: Any, rank: int, scaling: float) -> Any:
        rows, columns = weight.shape[-2:]
        torch.rand(7)
        if self.fault == "raises":
            raise Accident("in solve")
        if self.fault == "interrupted":
            raise KeyboardInterrupt
        if self.fault == "nan":
            a = torch.full((*weight.shape[:-2], rank, columns), float("nan"))
            return lorainit.Factors(a, torch.ones(*weight.shape[:-2], rows, rank))
        return lorainit.Factors(torch.ones(rank, columns + 1), torch.ones(rows, rank))


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("raises", Accident, "in solve"),
        ("interrupted", KeyboardInterrupt, ""),
        ("shape", errors.AdapterError, f"layer '{LAYER}'.*shape"),
        ("nan", errors.NonFiniteError, f"layer '{LAYER}'.*not finite"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True], ids=["base", "wrapped"])
def test_a_method_that_fails_installs_nothing(
    fault: str, kind: type[BaseException], words: str, wrapped: bool
) -> None:
    base = peft.get_peft_model(models.llama(), all_linear()) if wrapped else model()
    with untouched(base), pytest.raises(kind, match=words):
        install(base, method=BadMethod(fault), adapter_name="other")


@pytest.mark.parametrize("wrapped", [False, True], ids=["base", "wrapped"])
@pytest.mark.parametrize("where", ["in PEFT", "in install"])
def test_a_failure_in_the_middle_of_installing_is_undone(
    monkeypatch: pytest.MonkeyPatch, where: str, wrapped: bool
) -> None:
    from peft.tuners.lora import LoraLayer

    from lorainit.adapters import install as installing

    base = peft.get_peft_model(models.llama(), all_linear()) if wrapped else model()
    owner, name = (LoraLayer, "update_layer") if where == "in PEFT" else (installing, "put_pair")
    true, calls = getattr(owner, name), []

    def fails_at_the_fifth(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise Accident("half way")
        return true(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails_at_the_fifth)
    batch = good()[0]
    with torch.no_grad():
        before = base.eval()(**batch).logits
    with untouched(base), pytest.raises(Accident):
        install(base, adapter_name="other")
    with torch.no_grad():
        assert torch.equal(base(**batch).logits, before)
    monkeypatch.undo()
    install(base, adapter_name="other")


# --- wrapped models -----------------------------------------------------------------------------


def test_a_frozen_adapter_is_still_frozen_after_collecting() -> None:
    wrapped = peft.get_peft_model(models.llama(), all_linear())
    wrapped.requires_grad_(False)
    with untouched(wrapped):
        lorainit.collect_statistics(wrapped, all_linear(), data=good(), needs=NEEDS, progress=False)


def test_switched_off_adapters_are_still_off_after_collecting() -> None:
    wrapped = peft.get_peft_model(models.llama(), all_linear(init_lora_weights=False))
    wrapped.base_model.disable_adapter_layers()
    with untouched(wrapped):
        lorainit.collect_statistics(wrapped, all_linear(), data=good(), needs=NEEDS, progress=False)


def test_merged_adapters_are_refused() -> None:
    wrapped = peft.get_peft_model(models.llama(), all_linear(init_lora_weights=False))
    wrapped.merge_adapter()
    with untouched(wrapped), pytest.raises(errors.AdapterError, match=r"merged.*unmerge_adapter"):
        lorainit.collect_statistics(wrapped, all_linear(), data=good(), needs=NEEDS, progress=False)


def test_an_existing_adapter_keeps_its_rank() -> None:
    wrapped = install(models.llama())
    with untouched(wrapped), pytest.raises(errors.AdapterError) as caught:
        install(wrapped, LoraConfig(r=3, target_modules="all-linear"))
    for word in ("'default'", "r=2", "r=3", "adapter_name", "delete_adapter"):
        assert caught.match(word)


def test_an_existing_adapter_keeps_its_targets() -> None:
    wrapped = install(models.llama())
    with untouched(wrapped), pytest.raises(errors.AdapterError, match="target_modules"):
        install(wrapped, LoraConfig(r=2, target_modules=["q_proj"]))


def test_an_unknown_adapter_needs_a_configuration() -> None:
    wrapped = install(models.llama())
    with (
        untouched(wrapped),
        pytest.raises(errors.AdapterError, match=r"peft_config is None"),
    ):
        lorainit.get_peft_model(
            wrapped, None, method=lorainit.LoraDA(), data=good(), adapter_name="other"
        )


def test_an_existing_adapter_is_started_again() -> None:
    wrapped = peft.get_peft_model(models.llama(), all_linear())
    again = install(wrapped, None or all_linear())
    assert again is wrapped
    assert wrapped.get_base_model().get_submodule(LAYER).lora_B["default"].weight.any()


# --- statistics from elsewhere ------------------------------------------------------------------


def other_shape() -> lorainit.Statistics:
    bigger = models.llama(hidden_size=24)
    return lorainit.collect_statistics(
        bigger, all_linear(), data=good(), needs=NEEDS, progress=False
    )


def other_weights() -> lorainit.Statistics:
    return lorainit.collect_statistics(
        models.llama(seed=1), all_linear(), data=good(), needs=NEEDS, progress=False
    )


FOREIGN: dict[str, tuple[Callable[[], lorainit.Statistics], type[Exception], list[str]]] = {
    "other shapes": (
        other_shape,
        errors.StatisticsFileError,
        [f"layer '{LAYER}'", r"\(24, 24\)", r"\(16, 16\)", "another model"],
    ),
    "other weights": (
        other_weights,
        errors.StatisticsFileError,
        [f"layer '{LAYER}'", "other weights", "collect the statistics again"],
    ),
    "other layers": (
        lambda: collected(LoraConfig(r=2, target_modules=["o_proj"])),
        errors.StatisticsFileError,
        [f"no layer '{LAYER}'", "12 of 14", "o_proj", "collect them again"],
    ),
    "other statistics": (
        lambda: collected(needs={"gradient"}),
        errors.MissingStatisticError,
        ["LoraDA needs input_second_moment", f"layer '{LAYER}'", "needs=lorainit.LoraDA"],
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("through_a_file", [False, True], ids=["object", "file"])
def test_statistics_of_something_else(case: str, through_a_file: bool, tmp_path: Path) -> None:
    make, kind, words = FOREIGN[case]
    statistics = make()
    if through_a_file:
        statistics.save(tmp_path / "s.safetensors")
        statistics = lorainit.Statistics.load(tmp_path / "s.safetensors")
    base = model()
    with untouched(base), pytest.raises(kind) as caught:
        install(base, statistics=statistics)
    for word in words:
        assert caught.match(word)


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def tensors_of(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "statistics.safetensors"
    collected().save(path)
    return path


def rewritten(path: Path, change: Callable[[dict[str, str], dict[str, Tensor]], None]) -> Path:
    header, tensors = header_of(path), tensors_of(path)
    change(header, tensors)
    save_file(tensors, path, header)
    return path


def in_header(key: str, value: str | None) -> Callable[..., None]:
    def change(header: dict[str, str], tensors: dict[str, Tensor]) -> None:
        if value is None:
            del header[key]
        else:
            header[key] = value

    return change


def in_layer(**values: Any) -> Callable[..., None]:
    """Set, or with Ellipsis remove, entries of one layer's record."""

    def change(header: dict[str, str], tensors: dict[str, Tensor]) -> None:
        layers = json.loads(header["layers"])
        for key, value in values.items():
            if value is ...:
                del layers[LAYER][key]
            else:
                layers[LAYER][key] = value
        header["layers"] = json.dumps(layers)

    return change


def in_tensor(field: str, make: Callable[[Tensor], Tensor] | None) -> Callable[..., None]:
    def change(header: dict[str, str], tensors: dict[str, Tensor]) -> None:
        key = f"layer/{LAYER}/{field}"
        if make is None:
            del tensors[key]
        else:
            tensors[key] = make(tensors[key])

    return change


def of_fingerprint(value: Tensor) -> Callable[..., None]:
    def change(header: dict[str, str], tensors: dict[str, Tensor]) -> None:
        tensors[f"fingerprint/{LAYER}"] = value

    return change


HOSTILE: dict[str, Callable[..., None]] = {
    "no layers": in_header("layers", None),
    "no metadata": in_header("metadata", None),
    "no version": in_header("version", None),
    "a version that is no number": in_header("version", "one"),
    "layers that are no JSON": in_header("layers", "__import__('os').system('false')"),
    "layers that are a list": in_header("layers", "[]"),
    "layers that are a number": in_header("layers", "7"),
    "no layer at all": in_header("layers", "{}"),
    "layers nested without end": in_header("layers", "[" * 100_000),
    "a layer that is a text": in_header("layers", '{"x": "y"}'),
    "metadata that are a list": in_header("metadata", "[1, 2]"),
    "metadata that are a number": in_header("metadata", "3"),
    "unused layers that are a number": in_header("metadata", '{"unused": 3}'),
    "unused layers that are not names": in_header("metadata", '{"unused": [["x"]]}'),
    "no tensors": in_layer(tensors=...),
    "tensors that are a list": in_layer(tensors=["gradient_sum"]),
    "a tensor under an unhashable key": in_layer(tensors={"gradient_sum": ["a"]}),
    "a tensor that is not there": in_layer(tensors={"gradient_sum": "nowhere"}),
    "a statistic of another name": in_layer(tensors={"__class__": f"layer/{LAYER}/gradient_sum"}),
    "a count that is missing": in_layer(positions=...),
    "a count that is a text": in_layer(positions="many"),
    "a count that is a list": in_layer(positions=[1]),
    "a count that is negative": in_layer(positions=-1.0),
    "a count that is not a number": in_layer(sequences=float("nan")),
    "a count without end": in_layer(label_tokens=float("inf")),
    "a population that is a text": in_layer(population="many"),
    "a population that is negative": in_layer(population=-3.0),
    "an unknown reduction": in_layer(loss_reduction="mean"),
    "a tensor that was taken out": in_tensor("gradient_sum", None),
    "a gradient that is a vector": in_tensor("gradient_sum", lambda t: t[0].contiguous()),
    "a gradient of integers": in_tensor("gradient_sum", lambda t: t.long()),
    "a triangle that is cut short": in_tensor(
        "input_second_moment_sum", lambda t: t[:3].contiguous()
    ),
    "a moment that is no triangle": in_header("triangles", "{}"),
    "triangles that are a list": in_header("triangles", "[1]"),
    "a triangle without a width": in_header("triangles", '{"x": -1}'),
    "a triangle of another width": in_header(
        "triangles", json.dumps({f"layer/{LAYER}/input_second_moment_sum": 10**9})
    ),
    "a diagonal of another width": in_tensor(
        "output_second_moment_diagonal_sum", lambda t: t[:3].contiguous()
    ),
    "a fingerprint of integers": of_fingerprint(torch.arange(32)),
    "a fingerprint without end": of_fingerprint(torch.zeros(3, 4)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_from_a_stranger_is_data(case: str, saved: Path) -> None:
    rewritten(saved, HOSTILE[case])
    with pytest.raises(errors.StatisticsFileError) as caught:
        lorainit.Statistics.load(saved)
    assert caught.match(saved.name)
    assert len(str(caught.value)) < 700


def test_a_file_that_is_only_rewritten_still_loads(saved: Path) -> None:
    """The control: what refuses the hostile files is what was changed in them."""
    rewritten(saved, lambda header, tensors: None)
    install(models.llama(), statistics=lorainit.Statistics.load(saved))


class TestFilesThatAreNoStatistics:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(errors.StatisticsFileError, match=r"no statistics file.*gone"):
            lorainit.Statistics.load(tmp_path / "gone")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(errors.StatisticsFileError, match="no statistics file"):
            lorainit.Statistics.load(tmp_path)

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.9, 0.999])
    def test_truncated(self, saved: Path, share: float) -> None:
        whole = saved.read_bytes()
        saved.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(errors.StatisticsFileError, match=r"truncated.*Collect"):
            lorainit.Statistics.load(saved)

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04K\x01.", os.urandom(4096)])
    def test_anything(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(errors.StatisticsFileError, match=path.name):
            lorainit.Statistics.load(path)

    def test_a_pickle_is_not_opened(self, tmp_path: Path) -> None:
        class Exploit:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "ran",))

        path = tmp_path / "x.safetensors"
        torch.save({"layers": Exploit()}, path)
        with pytest.raises(errors.StatisticsFileError):
            lorainit.Statistics.load(path)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("header", [None, {"format": "pt"}])
    def test_other_safetensors(self, tmp_path: Path, header: dict[str, str] | None) -> None:
        path = tmp_path / "adapter.safetensors"
        save_file({"x": torch.ones(2)}, path, header)
        with pytest.raises(errors.StatisticsFileError, match=r"not one of lorainit's.*save"):
            lorainit.Statistics.load(path)

    def test_of_a_newer_version(self, saved: Path) -> None:
        rewritten(saved, in_header("version", "99"))
        with pytest.raises(errors.StatisticsFileError, match=r"version 99.*Upgrade lorainit"):
            lorainit.Statistics.load(saved)


class TestSavingFails:
    """The file that was there is still there, whole, and nothing is left beside it."""

    @pytest.fixture
    def broken(self, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
        def save(file: Any, tensor: Any) -> None:
            file.write(b"half of it")
            raise request.param

        monkeypatch.setattr(sharded_files, "_write_tensor", save)

    @pytest.mark.parametrize(
        "broken", [OSError(28, "No space left on device")], indirect=True, ids=["disk full"]
    )
    def test_disk_full(self, tmp_path: Path, saved: Path, broken: None) -> None:
        before = saved.read_bytes()
        with pytest.raises(OSError, match=r"No space left.*still there.*free some space"):
            collected().save(saved)
        assert saved.read_bytes() == before
        assert os.listdir(tmp_path) == [saved.name]

    @pytest.mark.parametrize("broken", [KeyboardInterrupt()], indirect=True, ids=["ctrl-c"])
    def test_interrupted(self, tmp_path: Path, saved: Path, broken: None) -> None:
        before = saved.read_bytes()
        with pytest.raises(KeyboardInterrupt):
            collected().save(saved)
        assert saved.read_bytes() == before
        assert os.listdir(tmp_path) == [saved.name]

    def test_onto_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "kept").touch()
        with pytest.raises(OSError, match="folder"):
            collected().save(tmp_path / "folder")
        assert os.listdir(tmp_path) == ["folder"]

    def test_where_nothing_may_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="could not be written"):
            collected().save(tmp_path / "file" / "below" / "x.safetensors")


# --- matrices that cannot be factored -------------------------------------------------------------


def repetitive() -> list[Batch]:
    """Prompts that are nearly all alike: few directions, each many times over."""
    row = {"input_ids": torch.tensor([5, 6, 7, 8]), "labels": torch.tensor([-100, -100, 7, 8])}
    return batches([row] * 32, 8)


def test_repetitive_data_give_a_singular_moment() -> None:
    """What the tests below stand on: the plain Cholesky of the collected moment fails."""
    found = lorainit.collect_statistics(
        models.llama(), all_linear(), data=repetitive(), needs=NEEDS, progress=False
    )
    failures = 0
    for layer in found.values():
        moment = layer.input_second_moment
        failures += int(torch.linalg.cholesky_ex(moment).info > 0)
        assert int(torch.linalg.matrix_rank(moment.double(), rtol=1e-5)) < moment.shape[0]
    assert failures > 0


def test_relative_damping_gives_a_useful_start_from_a_singular_moment() -> None:
    wrapped = install(models.llama(), data=repetitive())
    base = models.llama()
    batch = repetitive()[0]
    with torch.no_grad():
        before, after = base(**batch).loss, wrapped(**batch).loss
    for name, parameter in wrapped.named_parameters():
        assert torch.isfinite(parameter).all(), name
    assert torch.isfinite(after)
    assert float(after) < float(before)


DISPLACING = ["lora-one", "lora-da"]
BY_GRADIENT = [*DISPLACING, "lora-ga", "filet"]


def of_scale(scale: float) -> Callable[..., Tensor]:
    """A loss of one logit at the first token: gradients of rank one, or none at all."""

    def loss(base: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = base(**batch).logits
        return scale * logits[:, 0, 3].double()

    return loss


@pytest.mark.parametrize("scale", [0.0, 1.0], ids=["zero", "rank one"])
@pytest.mark.parametrize("name", BY_GRADIENT)
def test_gradients_of_less_than_the_rank(
    name: str, scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Said where nothing is there to follow; finite, and trainable, in any case."""
    base, batch = models.llama(), batches(ROWS[:1], 1)[0]
    with torch.no_grad():
        before = base(**batch).logits
    with caplog.at_level(logging.WARNING, logger="lorainit"):
        wrapped = install(
            base, method=lorainit.METHODS[name](), data=[batch], loss_fn=of_scale(scale)
        )
    said = f"the gradient of 14 of 14 layers is exactly zero ({LAYER}, "
    assert (said in caplog.text) == (scale == 0)
    with torch.no_grad():
        moved = float((wrapped(**batch).logits - before).abs().max())
    assert (moved > 0) == (name in DISPLACING and scale > 0)
    layers = [m for m in wrapped.get_base_model().modules() if hasattr(m, "lora_B")]
    for layer in layers:
        delta = layer.get_delta_weight("default")
        assert torch.isfinite(delta).all()
        if name in DISPLACING:
            assert int(torch.linalg.matrix_rank(delta, rtol=1e-3)) <= scale
    wrapped(**batch).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in wrapped.parameters())


@pytest.mark.parametrize("damping", [1e-30, 1e-12])
def test_hopeless_absolute_damping_names_the_layer_and_the_remedy(damping: float) -> None:
    base = model()
    method = lorainit.LoraDA(damping=damping, damping_mode="absolute")
    with untouched(base), pytest.raises(errors.FactorizationError) as caught:
        install(base, data=repetitive(), method=method)
    for word in ("layer 'model.layers", "not positive definite", "damping_mode='relative'"):
        assert caught.match(word)


def test_what_is_compared_would_show_a_change() -> None:
    """The control of `untouched`: each kind of change is seen."""

    def moved(base: nn.Module) -> None:
        with torch.no_grad():
            base.get_submodule(LAYER).weight.add_(0.0)

    changes: dict[str, Callable[[nn.Module], Any]] = {
        "weight": moved,
        "flag": lambda base: base.get_submodule(LAYER).requires_grad_(False),
        "mode": lambda base: base.train(),
        "gradient": lambda base: base.zero_grad(),
        "hook": lambda base: base.get_submodule(LAYER).register_forward_hook(lambda *_: None),
        "attribute": lambda base: setattr(base, "dropout", 0.5),
        "module": lambda base: setattr(base.model.layers[0].mlp, "up_proj", nn.Linear(16, 24)),
        "random state": lambda base: torch.rand(1),
    }
    for name, change in changes.items():
        base = unsettle(models.llama())
        base.get_submodule(LAYER).weight.requires_grad_(True)
        caught = False
        try:
            with untouched(base):
                change(base)
        except AssertionError:
            caught = True
        assert caught, name
    assert snapshot(base).keys()
