"""The three sentences on rate, rank and method, and the one on the layers that matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import lorainit
from lorainit.adapters.origin import Origin
from lorainit.report import StartLoss, report
from lorainit.report.advice import advice
from lorainit.report.energy import where_energy_is
from lorainit.report.measure import LayerReport
from lorainit.types import settings_of
from tests.adapters import tiny

RATE = {"learning_rate": 1.13e-3, "learning_rate_low": 6.3e-4, "learning_rate_high": 2.03e-3}


def layer(name: str = "model.layers.0.mlp.up_proj", **values: Any) -> LayerReport:
    depth = int(name.split(".")[2])
    found = LayerReport(name, depth, name.rpartition(".")[2], (64, 64), 4, configured_name=name)
    for key, value in values.items():
        setattr(found, key, value)
    return found


def kept(*signal: float, name: str = "model.layers.0.mlp.up_proj") -> LayerReport:
    return layer(name, signal=list(signal), kept=sum(signal[:4]))


def said(
    layers: Sequence[LayerReport] = (),
    method: Any = None,
    measured: Mapping[str, float] = {},
    *,
    anchored: bool = False,
    heads: Mapping[str, Any] = {},
    **arguments: Any,
) -> list[tuple[str, str]]:
    origin = None
    if method is not None:
        origin = Origin(anchored, settings_of(method), measured=measured, heads=heads)
    found = advice(
        list(layers) or [layer(size=0.01)], {}, rank=4, adapter=True, origin=origin, **arguments
    )
    assert [text.partition(":")[0] for _, text in found[:3]] == ["Rate", "Rank", "Method"]
    # One sentence each: a full stop ends it, and none is inside.
    assert all(text.endswith(".") and ". " not in text for _, text in found[:3])
    return found


@pytest.mark.parametrize("started", [{}, {"suggest_rate": True}, {"learning_rate": 1e-5}])
def test_a_report_opens_with_rate_rank_and_method(started: Any, tmp_path: Path) -> None:
    data = [tiny.batch(rows=12)]
    found = lorainit.collect_statistics(
        tiny.llama(), tiny.config(), data=data, needs=lorainit.Natural.needs, progress=False
    )
    model: Any = tiny.llama()
    if started:
        model = tiny.start(model, lorainit.Natural(), data=data, **started)
    said = report(model, tiny.config(), found, tmp_path / "a.html", methods=(), progress=False)
    assert [text.partition(":")[0] for _, text in said[:3]] == ["Rate", "Rank", "Method"]
    text = (tmp_path / "a.html").read_text()
    places = [text.index(f"<b>{word}</b>") for word in ("Rate", "Rank", "Method")]
    assert places == sorted(places)
    assert places[-1] < text.index("<h2>")
    assert ("train at a peak of" in said[0][1]) is bool(started)
    resized = "peak of 1e-05, which the adapter was resized for"
    assert (resized in said[0][1]) is ("learning_rate" in started)
    assert ("nothing is started yet" in said[2][1]) is not started


def test_the_rate_is_the_record_s_with_its_range_or_how_to_measure_one() -> None:
    (kind, text), *_ = said(method=lorainit.Natural(), measured=RATE)
    assert kind == "good"
    assert "0.0011," in text
    assert "0.0006 and 0.002" in text
    (kind, text), *_ = said(method=lorainit.Natural())
    assert kind == "note"
    assert "`lorainit.suggest_learning_rate(model, data)`" in text
    (_, text), *_ = advice([layer()], {}, rank=4)
    assert "`lorainit init` with `--data`" in text
    # A long step is no word on rates where one was measured.
    long = [layer(size=2.0)]
    assert "usual learning rate" in said(long, lorainit.LoraOne())[3][1]
    assert "usual learning rate" not in said(long, lorainit.LoraOne(), RATE)[3][1]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([kept(0.6, 0.1, 0.1, 0.1)], "keep r = 4; it holds 90%"),
        ([kept(*[0.1] * 4, *[0.1] * 4)], "raise it to r = 8"),
        ([kept(*[0.1] * 4, *[0.01] * 4)], "would add only 4 points"),
        (
            [kept(0.9, name=f"model.layers.{i}.mlp.up_proj") for i in range(4)]
            + [kept(0.1, name="model.layers.4.mlp.up_proj")],
            '`rank_pattern={"model.layers.4.mlp.up_proj": 8}`',
        ),
        ([layer()], "collect --method natural"),
    ],
)
def test_the_rank_follows_what_it_keeps(layers: list[LayerReport], words: str) -> None:
    assert words in said(layers)[1][1]


HELD = {"base_loss": 8.9, "start_loss": 3.1}


@pytest.mark.parametrize(
    ("method", "measured", "weight", "words"),
    [
        (lorainit.Natural(), HELD, "good", "keep it: the start of Natural takes 65% off the loss (8.9 to 3.1"),
        (lorainit.Auto(), HELD, "good", "keep it"),
        # Little, where nothing but the method's own refusal or a repair would explain it.
        (lorainit.Natural(), HELD | {"start_loss": 8.5}, "note", "which is little; take Auto"),
        (lorainit.Auto(), HELD | {"start_loss": 8.5}, "good", "keep it"),
        (lorainit.QERA(), HELD | {"start_loss": 8.5}, "good", "keep it"),
        (lorainit.Natural(), HELD | {"gain_error": 4.0}, "warn", "give it more sequences"),
        (lorainit.Natural(), {"base_loss": 3.0, "start_loss": 4.0}, "warn", "raises the loss from 3 to 4"),
        (lorainit.Natural(), HELD | {"start_loss": 8.9001}, "note", "takes nothing off the loss, 8.9"),
        (lorainit.Natural(), {"base_loss": -1.0, "start_loss": -2.0}, "good", "takes 1 off the loss"),
        (
            lorainit.Auto(),
            {"base_loss": 4.0, "start_loss": 4.0, "refused_loss": 3.9, "sequences": 13.0},
            "note",
            "keep the plain LoRA that Auto chose: the start that it measured takes only 2.5% off the loss, 4; "
            "more data may change that",
        ),
        # Auto that had nothing to measure on has not judged.
        (lorainit.Auto(), {"start_loss": 8.5}, "note", "which is little"),
        (lorainit.Natural(), {}, "note", "was not measured; give `--data`"),
    ],
)  # fmt: skip
def test_the_method_is_kept_or_not_by_what_its_start_took_off_the_loss(
    method: Any, measured: dict[str, float], weight: str, words: str
) -> None:
    loss = None
    if "start_loss" in measured:
        loss = StartLoss(
            measured.get("base_loss", 8.9),
            measured["start_loss"],
            "12 records",
            measured.get("gain_error"),
        )
    kind, text = said(method=method, measured=measured, loss=loss)[2]
    assert kind == weight
    assert words in text


def test_plain_lora_beside_heads_that_were_fitted_is_kept() -> None:
    heads = {"fitted": ["classifier"], "loss_before": 0.7, "loss_after": 0.52}
    kind, text = said([layer(size=0.0)], lorainit.Auto(), heads=heads)[2]
    assert kind == "good"
    assert "keep the plain LoRA that Auto is beside the heads" in text
    assert "from 0.7 to 0.52" in text
    # A head that was left as it is, a step that was taken all the same, another method.
    for other in (
        said([layer(size=0.0)], lorainit.Auto(), heads=heads | {"fitted": []}),
        said(method=lorainit.Auto(), heads=heads, measured=HELD, loss=StartLoss(8.9, 3.1, "x")),
        said([layer(size=0.0)], lorainit.Vanilla(), heads=heads),
    ):
        assert "beside the heads" not in other[2][1]


def test_starts_that_move_nothing_are_compared() -> None:
    kind, text = said(method=lorainit.FILet(), anchored=True, loss=StartLoss(4.0, 4.0, "x"))[2]
    assert kind == "good"
    assert "FILet starts at the base model's loss, 4; " in text
    assert "`lorainit compare --methods vanilla,filet`" in text
    _, text = said([layer(size=0.0)], lorainit.EVA())[2]
    assert "EVA starts at the base model's loss; " in text
    _, text = said([layer(size=0.0)])[2]
    assert "plain LoRA starts at the base model's loss; Auto" in text


def test_no_figure_is_of_a_model_of_the_loss(tmp_path: Path) -> None:
    """A fall from 8.9 to 3.1 is 65% of the loss, whatever a slope says."""
    found = said(method=lorainit.Natural(), measured=HELD, loss=StartLoss(8.9, 3.1, "x"))
    assert not any("promise" in text or "slope" in text for _, text in found)


def energies(values: Mapping[str, float]) -> list[LayerReport]:
    return [layer(f"model.layers.{name}", energy=value) for name, value in values.items()]


def test_where_half_of_the_energy_is() -> None:
    values = {f"{i}.attn.v_proj": 10.0 + i for i in (11, 12, 13, 15)}
    values |= {"11.mlp.down_proj": 30.0}
    values |= {f"{i}.mlp.up_proj": 1.0 for i in range(100)}
    assert where_energy_is(energies(values)) == (
        "Half of the gradient is in 5 of 105 layers: v_proj of blocks 11 to 13, 15 (41%), "
        "down_proj of block 11 (14%)."
    )
    # By hand: without the last of the five it is less than half of it.
    most = sorted(values.values(), reverse=True)
    assert sum(most[:4]) < sum(most) / 2 <= sum(most[:5])
    # Moved elsewhere, it is found elsewhere.
    assert "of 2 layers: k_proj of block 1 (90%)." in where_energy_is(
        energies({"0.attn.v_proj": 1.0, "1.attn.k_proj": 9.0})
    )
    assert where_energy_is([layer()]) == ""
