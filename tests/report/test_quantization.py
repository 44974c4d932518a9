"""What quantization took from the outputs, and what came back, against the layers' own inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorainit
from lorainit.adapters.layers import adapter_layers
from lorainit.errors import AdapterError, MissingStatisticError
from lorainit.report import make as making
from lorainit.report import report
from lorainit.report.maps import signed_percent
from lorainit.report.measure import LayerReport
from lorainit.report.quantization import QuantizationLoss, in_words
from tests.adapters import tiny
from tests.adapters.test_reference import quantized

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = [tiny.batch(rows=12)]


@pytest.fixture(scope="module")
def full() -> Any:
    return tiny.llama()


@pytest.fixture(scope="module")
def base(full: Any) -> Any:
    return quantized(full, levels=3)


@pytest.fixture(scope="module")
def statistics(base: Any) -> lorainit.Statistics:
    needs = lorainit.Natural.needs
    return lorainit.collect_statistics(base, tiny.config(), data=DATA, needs=needs, progress=False)


def inputs_of(model: Any) -> dict[str, Tensor]:
    """``(positions, in)`` of every linear layer, float64, as the model itself computes them."""
    found: dict[str, Tensor] = {}
    kept = DATA[0]["attention_mask"].bool()

    def keep(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = args[0][kept].double()

        return hook

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(**DATA[0])
    for hook in hooks:
        hook.remove()
    return found


def losses(
    model: Any,
    statistics: lorainit.Statistics,
    full: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, QuantizationLoss]:
    """As `report` finds them for its page."""
    seen: list[LayerReport] = []
    render = making.render

    def kept(layers: list[LayerReport], *rest: Any, **named: Any) -> str:
        seen.extend(layers)
        return render(layers, *rest, **named)

    monkeypatch.setattr(making, "render", kept)
    report(
        model,
        tiny.config(),
        statistics,
        folder / "page.html",
        methods=(),
        reference_weights=full,
        progress=False,
    )
    return {x.name: x.quantization for x in seen if x.quantization is not None}


@pytest.mark.parametrize(
    "method", [None, lorainit.Vanilla(), lorainit.QERA(), lorainit.LoftQ(), lorainit.PiSSA()]
)
def test_shares_are_those_of_the_outputs_themselves(
    method: Any,
    full: Any,
    base: Any,
    statistics: lorainit.Statistics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = quantized(full, levels=3)
    if method is not None:
        given = (
            {}
            if isinstance(method, lorainit.Vanilla | lorainit.PiSSA)
            else {"reference_weights": full}
        )
        model = tiny.start(model, method, data=DATA, **given)
    found = losses(model, statistics, full, tmp_path, monkeypatch)
    assert set(found) == set(statistics)
    inputs, plain = inputs_of(base), []
    for name, loss in found.items():
        weight = full.get_submodule(name).weight.double()
        error = weight - base.get_submodule(name).weight.double()
        x = inputs[name]
        took = (x @ error.mT).norm()
        assert loss.of_outputs == pytest.approx(float(took / (x @ weight.mT).norm()), rel=1e-4)
        assert loss.of_weight == pytest.approx(float(error.norm() / weight.norm()), rel=1e-6)
        if method is None:
            assert loss.given_back is None
            continue
        layer = adapter_layers(model, "default")[name]
        delta = layer(x.float()) - layer.base_layer(x.float())
        left = x @ error.mT - delta.detach().double()
        assert loss.given_back == pytest.approx(float(1 - left.norm() / took), abs=1e-4)
        added = layer.get_delta_weight("default").detach().double()
        plain.append(abs(float(1 - (error - added).norm() / error.norm()) - loss.given_back))
    if isinstance(method, lorainit.QERA):
        # The weights' own norm, without the inputs, would be another number.
        assert max(plain) > 0.02
    if isinstance(method, lorainit.Vanilla | lorainit.PiSSA):
        assert {round(loss.given_back or 0, 6) for loss in found.values()} == {0.0}
    text = (tmp_path / "page.html").read_text()
    assert "What quantization took" in text
    assert ("<h3>given back</h3>" in text) is (method is not None)


def test_qera_gives_back_more_than_loftq_and_a_turned_adapter_takes(
    full: Any,
    statistics: lorainit.Statistics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of(method: Any, factor: float = 1.0) -> dict[str, float]:
        model = tiny.start(quantized(full, levels=3), method, data=DATA, reference_weights=full)
        with torch.no_grad():
            for layer in adapter_layers(model, "default").values():
                layer.lora_B["default"].weight *= factor
        found = losses(model, statistics, full, tmp_path, monkeypatch)
        return {name: loss.given_back or 0.0 for name, loss in found.items()}

    qera, loftq = of(lorainit.QERA()), of(lorainit.LoftQ())
    assert all(qera[name] > loftq[name] > 0 for name in qera)
    assert max(of(lorainit.QERA(), -1.0).values()) < 0


def test_a_reference_is_checked_before_any_work(
    full: Any, base: Any, statistics: lorainit.Statistics, tmp_path: Path
) -> None:
    rest = (tiny.config(), statistics, tmp_path / "page.html")
    with pytest.raises(AdapterError, match="not what was quantized"):
        report(base, *rest, reference_weights=tiny.llama(seed=1), progress=False)
    gradients = lorainit.collect_statistics(
        base, tiny.config(), data=DATA, needs=lorainit.LoraOne().needs, progress=False
    )
    with pytest.raises(MissingStatisticError, match="input second moment"):
        report(base, rest[0], gradients, rest[2], reference_weights=full, progress=False)
    assert not rest[2].exists()


def test_the_sentence_names_the_most_and_the_least() -> None:
    found = {
        "a": QuantizationLoss(0.1, 0.05, 0.6),
        "b": QuantizationLoss(0.1, 0.20, 0.4),
        "c": QuantizationLoss(0.1, 0.10, -0.1),
    }
    assert in_words(found, adapter=True) == (
        "Quantization changes the layers' outputs by 10.0% of their size in the median layer, by 20.0% at "
        "most (b); this adapter gives 40% of that back in the median layer, most in a (60%), least in c (−10%)."
    )
    nothing = {"a": QuantizationLoss(0.1, 0.05, 0.0)}
    assert in_words(nothing, adapter=True).endswith("; this adapter gives nothing of it back.")
    assert in_words({"a": QuantizationLoss(0.1, 0.05)}, adapter=False).endswith("(a).")
    shown = [signed_percent(x) for x in (0.4, 0.042, -0.12, -0.001, 0.0, 0.0996)]
    assert shown == ["40%", "4.2%", "−12%", "0%", "0%", "10%"]
