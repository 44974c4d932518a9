"""The plan's bytes are those of the tensors, and several passes give what one gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from lorainit.adapters.targets import match_targets
from lorainit.statistics import CollectSettings, collect
from lorainit.statistics.accumulators import FOLD_FROM, add_gram, panels, unfold
from lorainit.statistics.plan import make_plan, statistic_bytes, total_bytes
from lorainit.types import STATISTICS, LayerStatistics

NEEDS = frozenset(STATISTICS)


def model_and_modules():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=31,
        )
    ).eval()
    targets = match_targets(model, LoraConfig(r=2, target_modules="all-linear")).layers
    return model, {name: target.module for name, target in targets.items()}


def batches():
    ids = torch.arange(3 * 8).reshape(3, 8) % 31
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]


@pytest.mark.parametrize(
    "needs", [NEEDS, frozenset({"gradient"}), frozenset({"input_second_moment"})]
)
def test_predicted_bytes_are_the_tensors(needs: frozenset[str]) -> None:
    model, modules = model_and_modules()
    found = collect(model, modules, batches(), CollectSettings(needs, progress=False))
    shapes = {name: tuple(module.weight.shape) for name, module in modules.items()}
    shared: dict[int, list[str]] = {}
    for name in found:
        shared.setdefault(id(found[name].input_second_moment_sum), []).append(name)
    groups = list(shared.values()) if "input_second_moment" in needs else []
    assert total_bytes(shapes, needs, shared=groups) == found.nbytes
    assert total_bytes(shapes, needs) >= found.nbytes


@pytest.mark.parametrize("share", [0.9, 0.4, 1e-9])
def test_several_passes_give_what_one_gives(share: float, caplog) -> None:
    model, modules = model_and_modules()
    settings = CollectSettings(NEEDS, progress=False)
    whole = collect(model, modules, batches(), settings)
    shapes = {name: tuple(module.weight.shape) for name, module in modules.items()}
    budget = max(1, int(share * total_bytes(shapes, NEEDS)))
    plan = make_plan(shapes, NEEDS, budget)
    assert len(plan.passes) > 1
    with caplog.at_level("INFO", logger="lorainit"):
        parts = collect(model, modules, batches(), replace(settings, max_memory=budget))
    assert str(plan) in caplog.text
    assert list(parts) == list(whole)
    assert parts.metadata == whole.metadata
    for name in whole:
        for field in LayerStatistics.TENSORS:
            one, many = getattr(whole[name], field), getattr(parts[name], field)
            assert (one is None) == (many is None)
            if one is not None:
                torch.testing.assert_close(many, one)
        assert parts[name].positions == whole[name].positions


def test_no_pass_is_above_the_budget_unless_one_layer_is() -> None:
    shapes = {str(i): (8 + i, 16) for i in range(9)}
    largest = max(sum(statistic_bytes(s, NEEDS).values()) for s in shapes.values())
    plan = make_plan(shapes, NEEDS, 3 * largest)
    assert [name for group in plan.passes for name in group] == list(shapes)
    assert plan.largest <= 3 * largest
    assert len(plan.passes) <= 4
    assert len(make_plan(shapes, NEEDS, 1).passes) == len(shapes)
    assert len(make_plan(shapes, NEEDS, None).passes) == 1


@pytest.mark.parametrize("width", [3, FOLD_FROM - 1, FOLD_FROM, FOLD_FROM + 77, 1100])
def test_folded_grams_are_grams(width: int) -> None:
    rows = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(0))
    total = add_gram(add_gram(None, rows[0]), rows[1])
    flat = rows.reshape(-1, width)
    if width >= FOLD_FROM:
        low, high = panels(width)[0]
        assert not total[high:, low:high].any()
    torch.testing.assert_close(unfold(total), flat.mT @ flat)


def test_a_budget_is_bytes() -> None:
    with pytest.raises(ValueError, match="max_memory"):
        CollectSettings(NEEDS, max_memory=0)
