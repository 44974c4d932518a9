"""The mask is the one that the model was called with, whatever the batch calls it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorainit
from lorainit.statistics.positions.calls import KnownMasks
from lorainit.statistics.positions.counted import positions_of
from tests.statistics import models
from tests.statistics.kinds import (
    KINDS,
    gemma3,
    images_in_text,
    led,
    made,
    parakeet,
    pegasus_x,
    spoken,
    together,
)
from tests.statistics.models import all_linear, pad, sequences

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = sequences(6)
NEEDS = {"gradient", "input_second_moment", "output_second_moment"}
SIDES = ("chosen", "rejected")


def collected(model: nn.Module, data: list[Any], **settings: Any) -> Any:
    settings = {"needs": NEEDS, "on_unused": "default", "progress": False} | settings
    return lorainit.collect_statistics(model, all_linear(), data=data, **settings)


def likelihood(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Of each row, the log-probability of its labels."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = batch["labels"][:, 1:]
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, wanted.clamp_min(0)[..., None])[..., 0]
    return (chosen * (wanted != -100)).sum(1)


def nested(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return likelihood(model, batch["rejected"]) - likelihood(model, batch["chosen"])


def renamed(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    sides = [{k: batch[f"{side}_{k}"] for k in pad(ROWS[:1])} for side in SIDES]
    return likelihood(model, sides[1]) - likelihood(model, sides[0])


def joined(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Both sides in one forward, whose mask is no tensor of the batch."""
    length = max(batch[side]["input_ids"].shape[1] for side in SIDES)
    whole = {
        key: torch.cat(
            [nn.functional.pad(batch[s][key], (0, length - batch[s][key].shape[1])) for s in SIDES]
        )
        for key in pad(ROWS[:1])
    }
    better, worse = likelihood(model, whole).chunk(2)
    return worse - better


def pairs(form: Callable[..., Tensor], chosen: Any, rejected: Any) -> Any:
    sides = {"chosen": pad(chosen, extra=3), "rejected": pad(rejected, extra=1)}
    if form is renamed:
        return {f"{side}_{k}": v for side, batch in sides.items() for k, v in batch.items()}
    return sides | {"margin": torch.zeros(len(chosen))}


def hooked(model: nn.Module, pairs: list[Any]) -> tuple[dict[str, Tensor], int]:
    """Plain sums over sequences that are run one by one, not padded."""
    sums: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                x = args[0].flatten(0, -2)
                sums[name] = sums.get(name, torch.zeros(())) + x.mT @ x

            handles.append(module.register_forward_hook(hook))
    count = 0
    with torch.no_grad():
        for row in (row for pair in pairs for row in pair):
            model(input_ids=row["input_ids"][None])
            count += len(row["input_ids"])
    for handle in handles:
        handle.remove()
    return sums, count


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("form", [nested, renamed, joined])
def test_masks_of_preferences(
    form: Callable[..., Tensor], checkpointing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Two forwards of a batch, each under its own mask, which the batch holds under another name."""
    model = models.llama(torch.float64)
    data = [pairs(form, ROWS[:2], ROWS[2:4]), pairs(form, ROWS[4:5], ROWS[5:])]
    expected, count = hooked(model, [ROWS])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.train()
    with caplog.at_level(logging.WARNING, logger="lorainit"):
        found = collected(model, data, loss_fn=form)
    assert "do not lie like" not in caplog.text
    for name, layer in found.items():
        if name != "lm_head":
            assert layer.positions == count
            torch.testing.assert_close(
                layer.input_second_moment_sum, expected[name], rtol=1e-6, atol=1e-9
            )


def test_masks_without_a_loss() -> None:
    """Methods that read inputs alone: the same masks."""
    model = models.llama(torch.float64)
    data = [pairs(nested, ROWS[:3], ROWS[3:])]
    expected, count = hooked(model, [ROWS])
    found = collected(model, data, loss_fn=nested, needs={"input_second_moment"})
    for name, layer in found.items():
        assert layer.positions == count
        torch.testing.assert_close(
            layer.input_second_moment_sum, expected[name], rtol=1e-6, atol=1e-9
        )


def test_a_mask_that_never_reaches_the_model_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def blind(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return model(input_ids=batch["chosen"]["input_ids"]).logits.sum((1, 2))  # type: ignore[no-any-return]

    for extra, said in ((3, 1), (0, 0)):
        caplog.clear()
        data = [{"margin": torch.zeros(1), "chosen": pad(ROWS[:1], extra=extra)}]
        with caplog.at_level(logging.WARNING, logger="lorainit"):
            collected(models.llama(), data, loss_fn=blind)
        assert caplog.text.count("do not lie like the attention mask") == said


def test_label_positions_are_those_of_the_text() -> None:
    """The text is as long as an image has patches, and the label's mask is not the patches'."""
    model = made(gemma3)
    rows = images_in_text()[:1]
    batch = together(rows)
    assert batch["input_ids"].shape[1] == 16
    found = collected(model, [batch], token_mask="labels")
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert found["model.vision_tower.encoder.layers.0.self_attn.q_proj"].positions == 16
    assert found["model.language_model.layers.0.self_attn.q_proj"].positions == labelled < 16


def test_what_a_decoder_is_given_without_a_mask_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Ids of the user's own, ending in padding, no mask and no labels of tokens."""

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return model(**batch).logits.sum((1, 2))  # type: ignore[no-any-return]

    batch = {k: v for k, v in pad(ROWS[:2]).items() if k != "labels"}
    ids = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 0]])
    for last, said in ((0, 1), (4, 0)):
        caplog.clear()
        ids[1, -1] = last
        with caplog.at_level(logging.WARNING, logger="lorainit"):
            collected(models.t5(), [batch | {"decoder_input_ids": ids}], loss_fn=loss)
        assert caplog.text.count("do not lie like the attention mask") == said
        assert "decoder" in caplog.text or not said


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("build", [led, pegasus_x])
def test_padding_of_the_models_own(build: Callable[[], nn.Module], masked: bool) -> None:
    """Two rows of one length, with a mask of ones or none: as many positions as tokens."""
    rows = [row for row in KINDS["led"].rows()[:1] for _ in range(2)]
    batch = together(rows)
    if not masked:
        del batch["attention_mask"]
    found = collected(made(build), [batch])
    first = next(n for n in found.names if "encoder.layers.0.fc1" in n)
    assert found[first].positions == batch["input_ids"].numel() == 18


def test_staggered_blocks(caplog: pytest.LogCaptureFixture) -> None:
    """Blocks that pad once more, by half a block on both sides: what they read of the tokens alone."""

    def staggered() -> nn.Module:
        model = pegasus_x()
        model.model.encoder.layers[0].stagger_blocks_this_layer = True
        return model

    model, rows = made(staggered), KINDS["pegasus_x"].rows()
    name = "model.encoder.layers.0.self_attn.out_proj"
    read: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda _, args, out: read.append(args[0].detach()[0]))
    for row in rows:
        model(**row)
    handle.remove()
    # Its global tokens give nothing to the loss.
    read = [x for x in read if len(x) == 32]
    assert len(read) == len(rows)
    own = torch.cat(
        [x[8 : 8 + row["input_ids"].shape[1]] for x, row in zip(read, rows, strict=True)]
    )
    with caplog.at_level(logging.WARNING, logger="lorainit"):
        found = collected(model, [together(rows)])[name]
    assert "do not lie like" not in caplog.text
    assert found.positions == len(own)
    expected = own.mT @ own
    torch.testing.assert_close(found.input_second_moment_sum, expected, rtol=1e-4, atol=1e-4)
    # The negative control: with the padding it is another.
    every = torch.cat(read)
    assert (every.mT @ every - expected).norm() > 1e-3 * expected.norm()


def test_steps_that_an_encoder_makes_of_sound(caplog: pytest.LogCaptureFixture) -> None:
    """One of eight frames: as many in a batch as alone, in and before the encoder's blocks."""
    model, rows = made(parakeet), spoken()
    names = ("encoder.subsampling.linear", "encoder.layers.0.self_attn.q_proj")
    alone = collected(model, rows)
    with caplog.at_level(logging.WARNING, logger="lorainit"):
        found = collected(model, [together(rows)])
    assert "do not lie like" not in caplog.text
    for name in names:
        assert found[name].positions == alone[name].positions < 4 * 9
        moments = (some[name].input_second_moment_sum for some in (found, alone))
        torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-4)


def test_a_mask_that_came_to_lie_where_another_was() -> None:
    """Masks are known by where they are, as long as they are there."""
    masks = KnownMasks()
    mask = torch.ones(2, 3)
    kept = masks.keep(mask, mask.shape, positions_of(mask, mask.device))
    assert masks.get(mask, mask.shape) is kept
    assert masks.get(mask, torch.Size((3, 2))) is None
    again = torch.empty(0).set_(mask.untyped_storage(), 0, (2, 3))
    assert masks.get(again, again.shape) is kept
    del mask
    assert masks.get(again, again.shape) is None


@pytest.mark.parametrize(
    ("leading", "expected"),
    [
        ((2, 3, 4), [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]),  # heads after the positions
        ((2, 4, 3), [0, 1, 3, 4, 6, 7, 9, 10, 12, 15, 18, 21]),  # before them
        ((2, 3, 3), None),  # either
        ((3, 2, 4), None),
    ],
)
def test_a_dimension_beside_positions(leading: tuple[int, ...], expected: list[int] | None) -> None:
    mask = positions_of(torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.device("cpu"))
    indices, known = mask.indices_for(torch.Size(leading))
    assert known == (expected is not None)
    assert (None if indices is None else indices.tolist()) == expected


def test_a_model_whose_forward_is_called_past_its_hooks() -> None:
    """As sentence-transformers and PEFT call the model inside: its mask is read all the same."""
    model = models.bert(head="MaskedLM")
    rows = [row for row in models.batches(models.sequences(6), 6)]

    def loss(model: Any, batch: Any) -> Tensor:
        kept = {k: v for k, v in batch.items() if k != "labels"}
        return model.forward(inputs := kept.pop("input_ids"), **kept).logits.flatten(1).sum(
            1
        ) / len(inputs)

    def called(model: Any, batch: Any) -> Tensor:
        kept = {k: v for k, v in batch.items() if k != "labels"}
        return model(inputs := kept.pop("input_ids"), **kept).logits.flatten(1).sum(1) / len(inputs)

    found, expected = (
        lorainit.collect_statistics(
            model,
            models.all_linear(),
            data=rows,
            needs=["input_second_moment"],
            loss_fn=fn,
            progress=False,
        )
        for fn in (loss, called)
    )
    assert "forward" not in vars(model)
    for name, layer in expected.items():
        assert found[name].positions == layer.positions
        torch.testing.assert_close(found[name].input_second_moment, layer.input_second_moment)


def test_rows_of_one_mask_are_masks_of_their_own() -> None:
    """A loss that runs a batch in parts, by rows or by halves: each part has its own padding."""
    model = models.llama()
    (batch,) = models.batches(models.sequences(6), 6)

    def in_parts(size: int) -> Callable[..., Tensor]:
        def loss(model: Any, batch: Any) -> Tensor:
            parts = [
                {key: value[first : first + size] for key, value in batch.items()}
                for first in range(0, len(batch["labels"]), size)
            ]
            return torch.cat(
                [
                    model(part["input_ids"], attention_mask=part["attention_mask"])
                    .logits.flatten(1)
                    .square()
                    .mean(1)
                    for part in parts
                ]
            )

        return loss

    found = [
        lorainit.collect_statistics(
            model,
            all_linear(),
            data=[batch],
            needs=["input_second_moment", "output_second_moment"],
            loss_fn=in_parts(size),
            progress=False,
        )
        for size in (1, 3, 6)
    ]
    for name, whole in found[-1].items():
        assert whole.positions < batch["attention_mask"].numel()
        for parts in found[:-1]:
            assert parts[name].positions == whole.positions
            for needed in ("input_second_moment", "output_second_moment"):
                torch.testing.assert_close(getattr(parts[name], needed), getattr(whole, needed))
