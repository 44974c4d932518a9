"""The data that travels between the rooms: statistics of a layer, factors, and what a method is."""

from lorainit.types.diagonal import Diagonal
from lorainit.types.factors import Factors, LayerSpec
from lorainit.types.layer_statistics import LayerStatistics
from lorainit.types.method import (
    ChangesStart,
    EstimatesWorkspace,
    GivesBack,
    LimitsRank,
    LowRankStep,
    MeasuresLength,
    Method,
    Metric,
    RanksDirections,
    RanksLayers,
    ReadsReference,
    ReadsWeight,
    RefusesStart,
    TakesSteps,
    UsesDefaultStart,
    settings_of,
)
from lorainit.types.names import (
    GRADIENT_STATISTICS,
    IGNORED,
    OF_INPUT,
    STATISTICS,
    DampingMode,
    GradientDtype,
    LossReduction,
    TokenMask,
)

__all__ = [
    "Diagonal",
    "GRADIENT_STATISTICS",
    "GivesBack",
    "IGNORED",
    "OF_INPUT",
    "STATISTICS",
    "ChangesStart",
    "DampingMode",
    "EstimatesWorkspace",
    "Factors",
    "GradientDtype",
    "LayerSpec",
    "LayerStatistics",
    "LimitsRank",
    "LossReduction",
    "LowRankStep",
    "MeasuresLength",
    "Method",
    "Metric",
    "RanksDirections",
    "RanksLayers",
    "ReadsWeight",
    "ReadsReference",
    "RefusesStart",
    "TakesSteps",
    "TokenMask",
    "UsesDefaultStart",
    "settings_of",
]
