"""Rank by layer under one budget: the strongest directions of all layers, wherever they are.

Which layer deserves rank is a question over all layers, so it is not part of a method's solve. The
method says what a direction is worth (EVA: its share of the inputs' variance; Natural: the decrease
of the loss that the quadratic model promises; KroneckerQER: what it takes from its objective); this
file counts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def rank_limits(
    configured: Mapping[str, int], possible: Mapping[str, int], rho: float
) -> dict[str, int]:
    """The most that each layer may get: `rho` times its configured rank, within what is possible.

    Args:
        configured: rank by layer.
        possible: ``min(out, in)``, or what the method allows, by layer.
        rho: at least 1.
    """
    return {n: max(1, min(int(rho * rank), possible[n])) for n, rank in configured.items()}


def allocate_ranks(
    values: Mapping[str, Tensor],
    configured: Mapping[str, int],
    costs: Mapping[str, int] | None = None,
    *,
    minimum: int = 1,
) -> dict[str, int]:
    """Give what the configured ranks cost to the directions of most value for their cost.

    Where all cost the same, no ranks within the budget are worth more. Where not, the best choice is a
    knapsack problem, and this is its greedy solution: what is worth most for its cost first, as long as it
    fits. It falls short of the best by at most what the first direction that does not fit is worth.

    Args:
        values: by layer, ``(limit,)`` descending: what its directions are worth; its length is the
            most that the layer may get.
        configured: rank by layer; what they cost is the budget.
        costs: of one direction, by layer. None: 1 each, so that the budget is the sum of the ranks.
        minimum: every layer keeps at least so many, so that none drops out of the adapter.

    Returns:
        Rank by layer, in the order of `configured`. They cost the budget, or less where the limits or the
        costs do not allow that much. Ties go to the layer that comes first.

    References:
        Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance
        Adaptation", arXiv 2410.07170, section 3, for EVA's redistribution. Dantzig, "Discrete-Variable
        Extremum Problems", Operations Research 5 (1957), for the greedy solution.
    """
    costs = costs or dict.fromkeys(configured, 1)
    ranks = {n: min(minimum, len(values[n])) for n in configured}
    spare = sum(costs[n] * (configured[n] - rank) for n, rank in ranks.items())
    rest = [(v / costs[n], n) for n, rank in ranks.items() for v in values[n][rank:].tolist()]
    # Values descend within a layer, so what is taken is a prefix of every layer's own.
    for _, name in sorted(rest, key=lambda one: one[0], reverse=True):
        if costs[name] <= spare:
            ranks[name] += 1
            spare -= costs[name]
    return ranks
