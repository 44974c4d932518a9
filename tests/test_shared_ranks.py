"""Ranks shared out over the layers by what quantization took of each, within the configured parameters."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import lorainit
from lorainit.errors import MissingStatisticError
from lorainit.methods import KroneckerQER
from lorainit.solve.ranks import allocate_ranks
from lorainit.types import LayerStatistics
from tests.adapters.tiny import batch, config, llama, logits, start
from tests.life.test_quantized_kinds import config as quantized_config
from tests.life.test_quantized_kinds import quantized, stored
from tests.methods.common import damped, layer, root

pytestmark = pytest.mark.filterwarnings("ignore")


class OfOneSum(KroneckerQER):
    """The control: the budget is the sum of the ranks, whatever a rank costs a layer."""

    keeps_parameters = False


def squares(statistics: LayerStatistics) -> Tensor:
    """Of all singular values of what quantization took of one layer in the method's metric.

    By roots from eigenvectors, in float64, over the positions that were counted.
    """
    error = statistics.weight_error
    assert error is not None
    x = root(damped(statistics.input_second_moment.double(), 0.01), 0.5)
    y = root(damped(statistics.output_second_moment.double(), 0.01), 0.5)
    return torch.linalg.svdvals(y @ error.double() @ x).square() * statistics.positions


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_direction_is_worth_its_squared_singular_value(dtype: torch.dtype) -> None:
    """Of layers of one shape together, each in its own units."""
    layers = [layer(seed=seed, dtype=dtype)[1] for seed in range(3)]
    layers[1] = replace(layers[1], positions=7 * layers[1].positions)
    found = KroneckerQER().rank_values(LayerStatistics.stack(layers), 9)
    assert found.shape == (3, 9)
    limit = 1e-9 if dtype == torch.float64 else 1e-4
    for mine, one in zip(found, layers, strict=True):
        torch.testing.assert_close(mine.double(), squares(one)[:9], rtol=limit, atol=0.0)
        alone = KroneckerQER().rank_values(one, 9)
        torch.testing.assert_close(alone, mine, rtol=limit, atol=0.0)


def test_values_are_what_the_start_takes_from_the_objective() -> None:
    """The sum of the first so many is what a start of the rank takes away."""
    weight, statistics = layer()
    error, values = statistics.weight_error, KroneckerQER().rank_values(statistics, 14)
    assert error is not None
    whole = squares(statistics).sum()
    for rank in (1, 5, 14):
        pair = KroneckerQER().solve(weight, statistics, rank, 2.0)
        rest = replace(statistics, weight_error=error - 2.0 * pair.B @ pair.A)
        left = squares(rest).sum()
        torch.testing.assert_close(whole - left, values[:rank].sum(), rtol=1e-9, atol=0.0)


def test_units_of_the_loss_are_counted_and_do_not_underflow() -> None:
    """Gradients a billion times smaller, in float32: values as much smaller, their order the same."""
    _, large = layer(dtype=torch.float32)
    assert large.output_second_moment_sum is not None
    small = replace(large, output_second_moment_sum=large.output_second_moment_sum * 1e-18)
    first, second = (KroneckerQER().rank_values(one, 5).double() for one in (large, small))
    torch.testing.assert_close(second * 1e18, first, rtol=1e-4, atol=0.0)


def test_values_need_what_the_base_was_quantized_from() -> None:
    _, statistics = layer()
    with pytest.raises(MissingStatisticError, match="reference_weights"):
        KroneckerQER().rank_values(replace(statistics, weight_error=None), 2)


def left_by(values: Mapping[str, Tensor], ranks: Mapping[str, int]) -> float:
    return sum(float(v[ranks[n] :].sum()) for n, v in values.items())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(4, 12), st.integers(4, 12)), min_size=2, max_size=6),
    st.booleans(),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 10_000),
)
def test_less_is_left_than_by_equal_ranks_up_to_one_direction(
    shapes: list[tuple[int, int]], same: bool, rank: int, rho: int, seed: int
) -> None:
    """Of the objective, summed over layers hurt more or less; nor more than by drawn ranks that cost no more.

    The greedy choice may leave more by one direction that does not fit; none where layers are of one shape.
    """
    rng = torch.Generator().manual_seed(seed)
    values, whole, costs = {}, {}, {}
    for number, shape in enumerate(shapes):
        out, inner = shapes[0] if same else shape
        _, own = layer(out=out, inner=inner, seed=seed + number)
        assert own.weight_error is not None
        hurt = 10 ** float(torch.rand((), generator=rng) * 2 - 1)
        own = replace(own, weight_error=own.weight_error * hurt)
        name = str(number)
        values[name] = KroneckerQER().rank_values(own, min(rho * rank, out, inner))
        whole[name], costs[name] = squares(own), out + inner
    configured = dict.fromkeys(values, rank)
    ranks = allocate_ranks(values, configured, costs)

    def parameters(some: Mapping[str, int]) -> int:
        return sum(costs[name] * one for name, one in some.items())

    assert min(ranks.values()) >= 1
    assert parameters(ranks) <= parameters(configured)
    beyond = [float(v[ranks[n]]) for n, v in values.items() if ranks[n] < len(v)]
    slack = 0.0 if same else max(beyond, default=0.0)
    slack += 1e-7 * left_by(whole, dict.fromkeys(whole, 0))
    assert left_by(whole, ranks) <= left_by(whole, configured) + slack
    drawn = {n: int(torch.randint(1, len(v) + 1, (), generator=rng)) for n, v in values.items()}
    if parameters(drawn) <= parameters(configured):
        assert left_by(whole, ranks) <= left_by(whole, drawn) + slack


def hurt(full: nn.Module, layers: dict[str, float]) -> Any:
    """Weights rounded coarsely in the layers that are named, each to so many levels; others finely."""
    model = copy.deepcopy(full)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "proj" in name:
                levels = layers.get(name, 30.0)
                step = module.weight.abs().amax(-1, keepdim=True) / levels
                module.weight.copy_((module.weight / step).round() * step)
    return model


def ranks_of(model: PeftModel) -> dict[str, int]:
    found = model.get_base_model().named_modules()
    return {n: m.r["default"] for n, m in found if isinstance(m, LoraLayer)}


def parameters_of(model: PeftModel) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def test_a_layer_that_was_hurt_more_gets_more_within_the_parameters() -> None:
    """Where the budget is a sum of ranks, wide layers that were hurt cost more parameters."""
    full = llama()
    worse = [f"model.layers.{n}.mlp.{kind}_proj" for n in (0, 1) for kind in ("up", "down")]

    def started(method: Any, some: list[str]) -> PeftModel:
        base = hurt(full, dict.fromkeys(some, 3.0))
        return start(base, method, reference_weights=full)

    equal = parameters_of(started(KroneckerQER(), worse))
    for some in ([], worse[:1], worse):
        found, other = (ranks_of(started(KroneckerQER(rho=3), one)) for one in (some, []))
        assert all(found[name] > other[name] for name in some)
        assert all(found[name] <= other[name] for name in found if name not in some)
        assert min(found.values()) >= 1
        assert max(found.values()) <= 12
    shared = parameters_of(started(KroneckerQER(rho=3), worse))
    # What is left over is less than a direction of the widest layer.
    assert equal - 80 < shared <= equal
    of_one_sum = started(OfOneSum(rho=3), worse)
    assert parameters_of(of_one_sum) > equal
    assert sum(ranks_of(of_one_sum).values()) == 4 * 14


def objective(model: PeftModel, full: nn.Module, statistics: Any) -> float:
    """What the start leaves, summed over layers."""
    total, base = 0.0, model.get_base_model()
    for layer_name, one in statistics.items():
        module = base.get_submodule(layer_name)
        error = full.get_submodule(layer_name).weight - module.base_layer.weight
        rest = error - module.get_delta_weight("default")
        total += float(squares(replace(one, weight_error=rest.detach())).sum())
    return total


def test_less_of_the_objective_is_left_than_by_equal_or_swapped_ranks() -> None:
    """Of whole starts, in float64; most to those that deserve least leaves more than equal ranks."""
    full = llama()
    worse = [n for n, m in full.named_modules() if isinstance(m, nn.Linear) and "proj" in n][:4]
    base = hurt(full, dict.fromkeys(worse, 3.0))
    statistics = lorainit.collect_statistics(
        base, config(), data=[batch()], needs=KroneckerQER.needs, progress=False
    )

    def left(method: Any, lora: Any) -> tuple[float, PeftModel]:
        model = copy.deepcopy(base)
        given = {"statistics": statistics, "data": None, "reference_weights": full}
        found = start(model, method, lora, **given)
        return objective(found, full, statistics), found

    shared, found = left(KroneckerQER(rho=3), config())
    equal, other = left(KroneckerQER(), config())
    assert parameters_of(found) <= parameters_of(other)
    # Scalings are divided out, so they may be others.
    ranks = ranks_of(found)
    order = sorted(ranks, key=ranks.__getitem__, reverse=True)
    swapped = dict(zip(order, sorted(ranks.values()), strict=True))
    against, third = left(KroneckerQER(), config(rank_pattern=swapped))
    assert ranks_of(third) == swapped != ranks
    assert shared < 0.95 * equal
    assert against > equal


def test_rho_of_one_changes_nothing() -> None:
    full = llama()
    assert KroneckerQER().rho == 1.0
    found = start(hurt(full, {}), KroneckerQER(), reference_weights=full)
    assert set(ranks_of(found).values()) == {4}


def test_an_adapter_that_exists_keeps_its_ranks() -> None:
    """As with EVA: what is there cannot change its shape."""
    full = llama()
    found = start(hurt(full, {}), KroneckerQER(), reference_weights=full)
    wanted = {n: p.clone() for n, p in found.named_parameters() if "lora_" in n}
    again = lorainit.get_peft_model(
        found,
        None,
        method=KroneckerQER(rho=3),
        data=[batch()],
        reference_weights=full,
        adapter_name="default",
        progress=False,
    )
    assert set(ranks_of(again).values()) == {4}
    for name, value in wanted.items():
        torch.testing.assert_close(again.get_parameter(name), value, rtol=1e-4, atol=1e-6)


def test_without_the_reference_it_is_refused_at_once() -> None:
    with pytest.raises(MissingStatisticError, match="reference_weights"):
        start(hurt(llama(), {}), KroneckerQER(rho=2))


@pytest.mark.parametrize("kind", ["nf4", "hqq3"])
def test_stock_peft_loads_it_on_the_quantized_base(kind: str, tmp_path: Path) -> None:
    """With a pattern of ranks, at one scaling, the stored weights the same to the bit."""
    full = llama()
    before = stored(quantized(kind, full))
    found = start(
        quantized(kind, full), KroneckerQER(rho=2), quantized_config(), reference_weights=full
    )
    ranks = ranks_of(found)
    equal = start(quantized(kind, full), KroneckerQER(), quantized_config(), reference_weights=full)
    assert parameters_of(equal) - 80 < parameters_of(found) <= parameters_of(equal)
    assert len(set(ranks.values())) > 2
    assert max(ranks.values()) <= 8
    live = logits(found)
    found.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(kind, full), tmp_path)
    assert ranks_of(again) == ranks
    assert again.peft_config["default"].rank_pattern
    torch.testing.assert_close(logits(again), live, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(w, stored(found)[n]) for n, w in before.items())


def test_a_memory_budget_gives_the_same_ranks_and_embeddings_have_one_too() -> None:
    """Ranks do not follow from how many layers are valued at once; a table of words is a target too."""
    full = llama()
    lora = config(target_modules=["embed_tokens", "q_proj", "down_proj"])
    base = hurt(full, {})
    with torch.no_grad():
        table = base.model.embed_tokens.weight
        step = table.abs().max() / 20
        table.copy_((table / step).round() * step)
    equal = start(copy.deepcopy(base), KroneckerQER(), lora, reference_weights=full)
    found = {}
    for memory in (None, "1GiB"):
        model = start(
            copy.deepcopy(base),
            KroneckerQER(rho=2),
            lora,
            reference_weights=full,
            max_memory=memory,
        )
        found[memory] = ranks_of(model)
        # The table costs a direction 64 + 32.
        assert parameters_of(equal) - 96 < parameters_of(model) <= parameters_of(equal)
    assert found[None] == found["1GiB"]
    assert len(set(found[None].values())) > 1


def test_the_reference_is_read_layer_by_layer() -> None:
    """For its check, for the ranks and for the solve, and none is kept in between."""
    full, alive, most = llama(), weakref.WeakSet(), [0]

    def source(name: str) -> Tensor:
        # As from a file: a tensor of its own each time.
        tensor = full.get_submodule(name).weight.detach().clone()
        alive.add(tensor)
        most[0] = max(most[0], len(alive))
        return tensor

    start(hurt(full, {}), KroneckerQER(rho=2), reference_weights=source)
    assert most[0] <= 2
