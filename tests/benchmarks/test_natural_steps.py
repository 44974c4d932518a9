"""The study of repeated natural steps: displacement, losses, and every variant on a tiny model."""

from __future__ import annotations

import argparse
import copy

import pytest
import torch
from benchmarks.quality.data.pools import pools_from_examples
from benchmarks.studies.natural_steps.__main__ import rows_of
from benchmarks.studies.natural_steps.displacement import LowRank, displaced, evaluate, mean_loss
from torch import nn

from tests.benchmarks.test_quality_trainer import PAD, base_model, examples

ARGUMENTS = argparse.Namespace(sequences=30, batch=8, test=12, rank=2)


@pytest.fixture(scope="module")
def pools():
    return pools_from_examples({"train": examples(64, 1), "test": examples(12, 2)}, PAD)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}


def test_a_displaced_model_is_one_with_other_weights(pools):
    model, batches = base_model(), pools["test"].batches(range(12), 5)
    modules = linear_layers(model)
    torch.manual_seed(0)
    terms = {
        name: LowRank(0.1 * torch.randn(m.out_features, 2), torch.randn(2, m.in_features))
        for name, m in modules.items()
    }
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, term in terms.items():
            moved.get_submodule(name).weight.add_(term.left @ term.right)
    with displaced(modules, terms):
        inside = evaluate(model, batches)
    assert inside == pytest.approx(evaluate(moved, batches), rel=1e-5)
    before = evaluate(base_model(), batches)
    assert evaluate(model, batches) == before != inside


def test_the_mean_over_tokens_is_the_models_own_loss(pools):
    """And the mean over sequences is not, where they differ in length."""
    model = base_model()
    (batch,) = pools["test"].batches(range(12), 12)
    with torch.no_grad():
        own = float(model(**batch).loss)
    assert mean_loss(model, [batch], "token") == pytest.approx(own, rel=1e-6)
    assert mean_loss(model, [batch], "sequence") != pytest.approx(own, rel=1e-3)


@pytest.mark.parametrize("variant", ["cut", "tangent", "late", "share", "shrink", "cut1"])
@pytest.mark.filterwarnings("ignore")
def test_every_variant_lowers_the_held_back_loss(variant, pools):
    model = base_model().requires_grad_(False)
    rows = rows_of(f"{variant}:2:0.1:sequence:attention:empirical", pools, 0, model, ARGUMENTS)
    assert [row["k"] for row in rows] == [0, 1, 2]
    assert rows[1]["held"] < rows[1]["held_before"]
    assert rows[1]["length"] > 0
    assert evaluate(model, pools["test"].batches(range(12), 12))[0] == pytest.approx(
        rows[0]["loss"], rel=1e-5
    )


@pytest.mark.filterwarnings("ignore")
def test_plain_lora_and_sampled_labels_run_too(pools):
    model = base_model().requires_grad_(False)
    rows = rows_of("lora:6:0.01:sequence:fit:3", pools, 0, model, ARGUMENTS)
    assert [row["k"] for row in rows] == [0, 3, 6]
    assert rows[2]["fit"] < rows[1]["fit"]
    rows = rows_of("cut:1:0.1/1:token:labels:true", pools, 0, model, ARGUMENTS)
    assert rows[1]["damping_chosen"] in (0.1, 1.0)
