import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorainit.solve.ranks import allocate_ranks, rank_limits


def worth(values, ranks):
    return sum(float(values[n][:r].sum()) for n, r in ranks.items())


def draw(seed, limits):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layer{i}": torch.rand(limit, generator=generator).sort(descending=True).values
        for i, limit in enumerate(limits)
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_no_other_allocation_is_worth_more(seed, limits):
    values = draw(seed, limits)
    configured = {n: max(1, len(v) // 2) for n, v in values.items()}
    found = allocate_ranks(values, configured)
    budget = sum(configured.values())
    assert sum(found.values()) == budget
    every = itertools.product(*(range(1, len(v) + 1) for v in values.values()))
    others = [dict(zip(values, ranks, strict=True)) for ranks in every if sum(ranks) == budget]
    assert worth(values, found) == pytest.approx(max(worth(values, o) for o in others))


def test_even_ranks_are_worth_less_where_layers_differ():
    """The control: keeping the configured ranks is not the best allocation."""
    values = {"strong": torch.tensor([9.0, 8.0, 7.0, 6.0]), "weak": torch.tensor([1.0, 0.1])}
    configured = {"strong": 2, "weak": 2}
    found = allocate_ranks(values, configured)
    assert found == {"strong": 3, "weak": 1}
    assert worth(values, found) > worth(values, configured)


def test_limits_bind_and_the_rest_of_the_budget_is_left():
    values = {"a": torch.tensor([5.0]), "b": torch.tensor([4.0, 3.0])}
    assert allocate_ranks(values, {"a": 4, "b": 4}) == {"a": 1, "b": 2}
    assert rank_limits({"a": 4, "b": 4}, {"a": 3, "b": 100}, 2.0) == {"a": 3, "b": 8}
    assert rank_limits({"a": 4}, {"a": 100}, 1.0) == {"a": 4}


def test_ties_go_to_the_first_layer():
    values = {"b": torch.ones(3), "a": torch.ones(3)}
    assert allocate_ranks(values, {"b": 2, "a": 2}) == {"b": 3, "a": 1}


def price(costs, ranks):
    return sum(costs[n] * r for n, r in ranks.items())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=4),
)
def test_with_costs_the_best_is_missed_by_one_direction_at_most(seed, layers):
    """The greedy solution of a knapsack problem, within what the configured ranks cost."""
    values = draw(seed, [limit for limit, _ in layers])
    costs = {n: cost for n, (_, cost) in zip(values, layers, strict=True)}
    configured = {n: max(1, len(v) // 2) for n, v in values.items()}
    found, budget = allocate_ranks(values, configured, costs), price(costs, configured)
    assert list(found) == list(configured)
    assert min(found.values()) >= 1
    assert price(costs, found) <= budget
    left = {n: float(v[found[n]]) for n, v in values.items() if found[n] < len(v)}
    # Nothing that is left would fit still.
    assert all(costs[n] > budget - price(costs, found) for n in left)
    every = itertools.product(*(range(1, len(v) + 1) for v in values.values()))
    others = [dict(zip(values, ranks, strict=True)) for ranks in every]
    best = max(worth(values, o) for o in others if price(costs, o) <= budget)
    assert worth(values, found) <= best + 1e-6
    assert best <= worth(values, found) + max(left.values(), default=0.0) + 1e-6
    # For what it costs itself, nothing is worth more where all that was passed over is worth less.
    sparing = min(
        (float(v[found[n] - 1]) / costs[n] for n, v in values.items() if found[n] > 1), default=0.0
    )
    if all(value / costs[n] <= sparing for n, value in left.items()):
        spent = price(costs, found)
        assert worth(values, found) == pytest.approx(
            max(worth(values, o) for o in others if price(costs, o) <= spent)
        )


def test_the_greedy_solution_may_miss_the_best():
    """The control: a cheap direction is worth more for its cost and leaves too little for a wide one."""
    values = {"narrow": torch.tensor([5.0, 4.0]), "wide": torch.tensor([6.0, 5.0])}
    costs, configured = {"narrow": 2, "wide": 3}, {"narrow": 1, "wide": 2}
    found = allocate_ranks(values, configured, costs)
    assert found == {"narrow": 2, "wide": 1}
    assert worth(values, found) == worth(values, configured) - 1.0


def test_a_dear_direction_has_to_be_worth_its_cost():
    """Without costs the same values go to the wide layer, at more parameters."""
    values = {"narrow": torch.tensor([4.0, 3.0, 2.0]), "wide": torch.tensor([9.0, 8.0, 7.0])}
    costs, configured = {"narrow": 2, "wide": 8}, dict.fromkeys(values, 2)
    assert allocate_ranks(values, configured) == {"narrow": 1, "wide": 3}
    assert price(costs, {"narrow": 1, "wide": 3}) > price(costs, configured)
    assert allocate_ranks(values, configured, costs) == {"narrow": 3, "wide": 1}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 9)
)
def test_costs_that_are_equal_change_nothing(seed, limits, cost):
    """With ties as well: values of one digit."""
    values = {n: (10 * v).ceil() for n, v in draw(seed, limits).items()}
    configured = {n: max(1, len(v) // 2) for n, v in values.items()}
    found = allocate_ranks(values, configured, dict.fromkeys(values, cost))
    assert found == allocate_ranks(values, configured)
