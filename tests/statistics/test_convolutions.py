"""Convolutions as linear layers over patches: their statistics, against autograd and loops over locations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lorainit
from lorainit.errors import TargetError
from lorainit.models import convolution
from lorainit.models.convolution import Convolution
from tests.statistics import models, reference
from tests.statistics.models import VOCABULARY
from tests.statistics.test_against_autograd import assert_close, assert_true, collect, speech
from tests.statistics.test_invariance import COUNTS, QUANTITIES

F64 = torch.float64
TARGETS = ["first", "second", "beside", "third", "last"]


class Network(nn.Module):
    """Convolutions in two dimensions, of which two read one tensor, and in one; then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 6, (3, 2), stride=2, padding=(1, 0))
        self.beside = nn.Conv2d(5, 6, (3, 2), stride=2, padding=(1, 0), bias=False)
        self.third = nn.Conv1d(6, 7, 4, stride=3, padding=1)
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        hidden = torch.tanh(self.second(hidden)) * torch.tanh(self.beside(hidden))
        scores: Tensor = self.last(torch.tanh(self.third(hidden.flatten(2))).mean(-1))
        return scores


def network(dtype: torch.dtype = F64) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network().to(dtype).eval()


def images(*sizes: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    count = sum(sizes)
    x = torch.randn(count, 3, 7, 6, dtype=F64, generator=generator)
    parts = x.split(sizes), (torch.arange(count) % 3).split(sizes)
    return [{"x": a, "labels": b} for a, b in zip(*parts, strict=True)]


def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


def single_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor | None]:
    return list(losses(model, batch))


def found(data: Sequence[Mapping[str, Tensor]], **settings: Any) -> lorainit.Statistics:
    config = LoraConfig(r=2, target_modules=TARGETS)
    return collect(network(), data, config=config, loss_fn=losses, **settings)  # type: ignore[arg-type]


GEOMETRIES = [
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 3},
    {"padding": "same", "dilation": 2},
    {"padding": 2, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect", "stride": 3},
    {"padding": 1, "padding_mode": "replicate"},
]


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_convolution_is_a_product_with_its_patches(kind: Any, geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4, 3, bias=False, **geometry).double()
    x = torch.randn(2, 3, *([9, 8][: layer.weight.dim() - 2]), dtype=F64)
    form = Convolution.of(layer)
    assert form is not None
    rows = form.patches(x)
    out = layer(x).detach()
    assert form.leading(x, None) == form.leading(None, out) == tuple(rows.shape[:2])
    assert_close((rows @ layer.weight.flatten(1).mT).detach(), out.flatten(2).mT, "the output")
    left, right = torch.randn(4, 2, dtype=F64), torch.randn(2, rows.shape[-1], dtype=F64)
    added = form.low_rank(x, left, right)
    with torch.no_grad():
        layer.weight += (left @ right).reshape(layer.weight.shape)
    assert_close(added, layer(x).detach() - out, "a change of the weight")
    # The control: patches in another order are another product.
    shuffled = (rows.flip(-1) @ layer.weight.flatten(1).mT).detach()
    assert float((shuffled - out.flatten(2).mT).abs().max()) > 0.1


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (5,), (3, 2)])
def test_against_autograd(sizes: tuple[int, ...]) -> None:
    data = images(*sizes)
    truth = reference.reference(network(), TARGETS, data, single_losses)
    statistics = found(data)
    assert_true(statistics, truth)
    assert statistics["first"].positions == 5 * 42
    # Two that read the same patches of one tensor share their sums; others do not.
    moments = [statistics[name].input_second_moment_sum for name in ("first", "second", "beside")]
    assert moments[1] is moments[2]
    assert moments[0] is not moments[1]


def test_few_samples_are_unfolded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = found(images(5))
    monkeypatch.setattr(convolution, "_AT_ONCE", 1)
    for name, layer in found(images(5)).items():
        for key in QUANTITIES:
            assert_close(getattr(layer, key), getattr(whole[name], key), f"{name}: {key}")
        assert [getattr(layer, c) for c in COUNTS] == [getattr(whole[name], c) for c in COUNTS]


@pytest.mark.parametrize("needs", [{"input_second_moment"}, {"output_second_moment_diagonal"}])
def test_some_statistics_alone(needs: set[str]) -> None:
    whole, alone = found(images(2, 3)), found(images(2, 3), needs=needs)
    for name, layer in alone.items():
        for need in needs:
            assert_close(getattr(layer, need), getattr(whole[name], need), f"{name}: {need}")
        assert layer.positions == whole[name].positions


def test_layers_apart_share_no_sums_with_another_geometry() -> None:
    """A one-by-one convolution beside one of three reads the same tensor, and other patches."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(2, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = (torch.tanh(self.wide(x)) + self.narrow(x)).mean(-1)
            return scores

    torch.manual_seed(0)
    model, data = (
        Beside().double(),
        [{"x": torch.randn(4, 2, 6, dtype=F64), "labels": torch.arange(4)}],
    )
    statistics = collect(
        model, data, config=LoraConfig(r=2, target_modules=["wide", "narrow"]), loss_fn=losses
    )
    assert_true(statistics, reference.reference(model, ["wide", "narrow"], data, single_losses))


# --- sound: positions that are padding -----------------------------------------------------------


def sound_config() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["conv1", "conv2", "q_proj"])


@pytest.mark.parametrize("lengths", [None, [20, 13, 8, 5]], ids=["whole", "padded"])
def test_whisper(lengths: list[int] | None) -> None:
    """Its first convolution keeps the frames, the second makes one step of two."""

    def counted(name: str, batch: Mapping[str, Tensor]) -> Tensor | None:
        if lengths is None and ("conv" in name or ".encoder." in name):
            return None
        frames = torch.tensor(lengths or [20] * 4)[:, None]
        if name.endswith("conv1"):
            return torch.arange(20) < frames
        if "conv2" in name or ".encoder." in name:
            return torch.arange(10) < (frames + 1) // 2
        return batch["labels"] != -100

    model = models.whisper(F64)
    data = speech(lengths)
    statistics = collect(model, data, config=sound_config())
    truth = reference.reference(
        model, list(statistics), data, reference.sequence_to_sequence, counted
    )
    assert any("conv2" in name for name in statistics)
    assert_true(statistics, truth)


def test_padded_sound_counts_what_it_counts_alone() -> None:
    """The feature extractor's three lengths, each by the convolutions before it."""
    samples = [64, 40, 25]
    torch.manual_seed(0)
    values = torch.randn(3, 64, dtype=F64) * (torch.arange(64) < torch.tensor(samples)[:, None])
    labels = torch.tensor([0, 2, 1])
    config = LoraConfig(r=2, target_modules=["conv"])
    mask = (torch.arange(64) < torch.tensor(samples)[:, None]).long()
    padded = [{"input_values": values, "attention_mask": mask, "labels": labels}]
    alone = [
        {
            "input_values": values[i : i + 1, :n],
            "attention_mask": mask[i : i + 1, :n],
            "labels": labels[i : i + 1],
        }
        for i, n in enumerate(samples)
    ]
    unmasked = [{key: value for key, value in padded[0].items() if key != "attention_mask"}]
    model = models.wav2vec2(F64)
    together, apart = (collect(model, data, config=config) for data in (padded, alone))
    assert [layer.positions for layer in together.values()] == [21 + 13 + 8, 10 + 6 + 4]
    assert [layer.positions for layer in collect(model, unmasked, config=config).values()] == [
        63,
        30,
    ]
    for name, layer in together.items():
        assert layer.positions == apart[name].positions
    first = next(iter(together))
    assert_close(
        together[first].input_second_moment, apart[first].input_second_moment, "patches of samples"
    )


# --- what is left out ---------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.odd = nn.Conv1d(4, 4, 3, **({"padding": 1} | settings))
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.odd(x).mean(-1))
        return scores


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"groups": 2}, "Conv1d in 2 groups"),
        ({"padding": "same", "dilation": 2}, "has no dilation"),
        ({"padding_mode": "circular"}, "pads with zeros"),
    ],
)
def test_what_is_no_linear_layer_in_peft_is_left_out_and_named(
    settings: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = [{"x": torch.randn(4, 4, 6), "labels": torch.arange(4)}]
    with caplog.at_level("INFO", logger="lorainit"):
        started = lorainit.get_peft_model(
            Odd(**settings),
            LoraConfig(r=2, target_modules=["odd", "head"]),
            method=lorainit.FILet(),
            data=data,
            loss_fn=losses,
            progress=False,
        )
    assert reason in caplog.text
    layer = started.base_model.model.odd
    assert float(layer.lora_B["default"].weight.detach().abs().max()) == 0
    # Only PEFT's own pair of a grouped convolution cannot be anchored, by an anchor of zeros.
    assert layer.r["default"] == (2 if "groups" in settings else 4)
    assert started.base_model.model.head.r["default"] == 4


def test_a_patch_that_is_too_wide_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "MAX_WIDTH", 11)
    reason = convolution.unserved(Odd().odd)
    assert reason == "Conv1d with patches of 12 numbers, above the limit of 11"
    monkeypatch.setattr(convolution, "MAX_WIDTH", 12)
    assert convolution.unserved(Odd().odd) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dilation": 2}, "with dilation"),
        ({"groups": 4}, "at ranks divisible by 4 only, not 2"),
    ],
)
def test_what_peft_cannot_adapt_is_said_before_any_work(
    settings: dict[str, Any], message: str
) -> None:
    data = [{"x": torch.randn(4, 4, 6), "labels": torch.arange(4)}]
    with pytest.raises(TargetError, match=message):
        lorainit.get_peft_model(
            Odd(**settings),
            LoraConfig(r=2, target_modules=["odd", "head"]),
            method=lorainit.EVA(),
            data=data,
            loss_fn=losses,
        )


def test_a_convolution_that_computes_more_is_left_out() -> None:
    class Standardized(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight / self.weight.std(), self.bias)

    assert "computes more" in str(convolution.unserved(Standardized(2, 2, 1)))
    computed = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 1))
    assert "computed anew" in str(convolution.unserved(computed))
