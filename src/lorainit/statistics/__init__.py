"""Hooks, accumulators, token masks, loss reduction: sums and counts of every target layer."""

from lorainit.statistics.collect import collect, prepare
from lorainit.statistics.finishing import check_unused
from lorainit.statistics.losses import LossFunction
from lorainit.statistics.settings import CollectSettings
from lorainit.statistics.store import Statistics

__all__ = ["CollectSettings", "LossFunction", "Statistics", "check_unused", "collect", "prepare"]
