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
