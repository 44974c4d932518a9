"""Functions inside the package whose time is taken, and single operations that are timed by themselves.

Nothing else of `benchmarks.speed` and `benchmarks.scaling` knows names that are not public.
"""

from __future__ import annotations

import importlib

from lorainit.adapters import install as install_module
from lorainit.adapters.reference import ReferenceWeights
from lorainit.calibration.repeated_steps import RepeatedSteps
from lorainit.calibration.step_stack import StepStack
from lorainit.linalg.triangular import lower_inverse
from lorainit.pipeline import measurements, start
from lorainit.statistics import collection
from lorainit.statistics.blocks.block_pass import BlockPass
from lorainit.statistics.collect import accumulators, finalize, reduction

# Its name is also that of a function of the package.
entry_module = importlib.import_module("lorainit.pipeline.get_peft_model")

PARTS_OF_A_START = (
    ("plan", measurements, "plan_collection"),
    ("plan", collection, "plan_collection"),
    ("pass", collection, "run_batches"),
    ("pass", BlockPass, "forward"),
    ("pass", BlockPass, "collect"),
    ("finish", collection, "finish"),
    ("solve", start, "solve_layers"),
    ("step", StepStack, "all_measured"),
    ("step", StepStack, "forgetting"),
    ("search", RepeatedSteps, "_search"),
    ("install", install_module, "install"),
)
"""For `Clock.watching`: what `get_peft_model` does from batches to an installed adapter."""

READING_A_REFERENCE = (("read", ReferenceWeights, "read"),)
"""Full-precision weights of a quantized base, from where they are."""

PARTS_OVER_PROCESSES = (
    ("reduce_layers", finalize, "reduce_layers"),
    ("reduce_to_owners", reduction, "reduce_to_owners"),
    ("check_layers", finalize, "_check_layers"),
    ("fingerprints", measurements.Measurements, "_fingerprints"),
    ("run", collection, "run_batches"),
    ("finish", collection, "finish"),
    ("solve_layers", start, "solve_layers"),
    ("install", install_module, "install"),
    ("wrap", entry_module, "create_adapter"),
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
