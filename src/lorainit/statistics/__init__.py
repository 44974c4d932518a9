"""Sums and counts of every target layer: collected by hooks, held by name, kept in files."""

from lorainit.statistics.loss.batch_loss import LossFunction
from lorainit.statistics.settings import CollectSettings
from lorainit.statistics.store.statistics import Statistics

__all__ = ["CollectSettings", "LossFunction", "Statistics"]
