"""Curves of the study of first steps: those that the package measures, and what it would suggest of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.initialization import lora_config, take_out
from benchmarks.studies.first_steps import RATES, curves, suggestion

import lorainit
from tests.adapters.tiny import llama

BATCHES = [
    {"input_ids": part, "labels": part}
    for part in (torch.arange(10) + torch.arange(128)[:, None] % 6).split(32)
]


def experiment(method: str, **settings: Any) -> Experiment:
    return Experiment("gcd", method, 1.0, settings=settings, rank=4)


@pytest.mark.parametrize("method", ["vanilla", "natural"])
def test_curves_are_what_the_package_measures(method: str) -> None:
    """A start of measured length from the base, others from where they stand; the model is as it was."""
    model, line = llama(), experiment(method)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = curves(model, line, BATCHES, more=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.manual_seed(line.seed)
    wrapped = lorainit.get_peft_model(
        model, lora_config(line), method=line.build_method(), data=BATCHES, max_sequences=None,
        progress=False,
    )  # fmt: skip
    rate = lorainit.suggest_learning_rate(wrapped, BATCHES, progress=False)
    take_out(wrapped, model)
    curve = found["curves"]["base" if method == "natural" else "apart"]
    assert curve[0] == pytest.approx(rate.start_loss, rel=1e-5)
    measured = dict(zip(RATES, curve[1:], strict=True))
    shared = [(r, loss) for r, loss in rate.trials if any(abs(r / k - 1) < 1e-6 for k in RATES)]
    assert len(shared) >= 4
    for r, loss in shared:
        nearest = min(RATES, key=lambda k: abs(k / r - 1))
        assert measured[nearest] == pytest.approx(loss, rel=1e-5)
    # Control: one step is another.
    assert found["curves"]["one"][-1] != pytest.approx(curve[-1], rel=1e-3)


def test_a_suggestion_is_by_the_package_rule_from_the_right_curve() -> None:
    losses = [4.0, 3.5, 3.0, 2.5, 2.0, 2.2, 2.6, 3.0, 3.5, 4.0, 5.0]
    other = [4.0, 3.5, 3.0, 2.5, 2.3, 2.2, 2.1, 2.0, 2.5, 4.0, 5.0]

    def said(line: Experiment) -> float:
        record = {
            "experiment": line.to_json(), "commit": "c", "device": "d", "versions": {}, "rates": RATES,
            "curves": {"apart": [4.2, *losses], "base": [4.2, *other]},
        }  # fmt: skip
        found = suggestion(record)
        assert found["stage"] == "suggestions"
        return found["suggestion"]["two_steps"]

    plain, length = said(experiment("lora-da")), said(experiment("lora-da", scale="calibrated"))
    assert plain == pytest.approx(3e-4, rel=0.3)
    assert length == pytest.approx(1.9e-3, rel=0.5)
    assert said(experiment("auto")) == length
