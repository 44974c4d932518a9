"""The names that settings and statistics go by."""

from __future__ import annotations

from typing import Literal

LossReduction = Literal["sequence", "token"]
TokenMask = Literal["attention", "labels"]
GradientDtype = Literal["float32", "bfloat16"]
DampingMode = Literal["relative", "absolute"]

STATISTICS: frozenset[str] = frozenset(
    {
        "gradient",
        "input_second_moment",
        "input_mean",
        "output_second_moment",
        "output_second_moment_diagonal",
    }
)
"""Every name that may stand in a method's ``needs``."""

OF_INPUT: frozenset[str] = frozenset({"input_second_moment", "input_mean"})
"""The statistics of a layer's input, which other layers may read too."""

GRADIENT_STATISTICS: frozenset[str] = STATISTICS - OF_INPUT
"""The statistics that need a backward pass."""

IGNORED = -100
"""The label that counts for nothing, as everywhere in transformers."""
