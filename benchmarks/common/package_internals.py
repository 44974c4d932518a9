"""Functions inside the package whose time is taken, and single operations that are timed by themselves.

Nothing else of `benchmarks.speed` and `benchmarks.scaling` knows names that are not public.
"""

from __future__ import annotations

import importlib

from lorainit import pipeline
from lorainit import start as start_module
from lorainit.adapters import install as install_module
from lorainit.linalg.triangle import lower_inverse
from lorainit.statistics import accumulators, finishing, reduction

collect_module = importlib.import_module("lorainit.statistics.collect")

PARTS_OF_A_START = (
    ("plan", start_module, "prepare"),
    ("plan", collect_module, "prepare"),
    ("pass", collect_module, "run_batches"),
    ("finish", collect_module, "finish"),
    ("solve", start_module, "solve_layers"),
    ("install", install_module, "install"),
)
"""For `Clock.watching`: what `get_peft_model` does from batches to an installed adapter."""

PARTS_OVER_PROCESSES = (
    ("reduce_layers", finishing, "reduce_layers"),
    ("to_owners", reduction, "to_owners"),
    ("check_layers", finishing, "_check_layers"),
    ("fingerprints", start_module.Measured, "_fingerprints"),
    ("run", collect_module, "run_batches"),
    ("finish", collect_module, "finish"),
    ("solve_layers", start_module, "solve_layers"),
    ("install", install_module, "install"),
    ("wrap", pipeline, "create_adapter"),
)
"""The same, where several processes do it."""

SUMS = (
    (accumulators.LayerSums, "add_gradient"),
    (accumulators.LayerSums, "add_output"),
    (accumulators.InputSums, "add"),
)
"""What a pass adds up, by method."""

add_product = accumulators.add_product
add_gram = accumulators.add_gram
add_squares = accumulators.add_squares
inverse_of_triangle = lower_inverse
