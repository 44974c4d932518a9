"""Ways to solve, beside one another: which arithmetic, and how wide a block.

    python -m benchmarks.studies.solver --out study.jsonl          7B shapes on CUDA, about 100 s
    python -m benchmarks.studies.solver --shape tiny               the same at tiny size on a CPU

Statistics are collected from a few decoder layers with random weights (flat spectra, the hard case), and
made up with falling spectra. Seconds are for the whole model, from the layers that are solved times
their number. Errors are sines of the largest angle between subspaces, against float64.
Where a solve's time goes: `benchmarks.studies.solve_profile`.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from benchmarks.common.decoder import SHAPES
from benchmarks.common.provenance import provenance
from benchmarks.studies.solver.harness import Study
from benchmarks.studies.solver.operations import factorizations, thin_products
from benchmarks.studies.solver.solves import study_solves, without_dense
from benchmarks.studies.solver.statistics import from_model, made_up
from lorainit import linalg
from lorainit.linalg import thresholds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=("llama-2-7b", "tiny"), default="llama-2-7b")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=115)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    study = Study(device, options.out, time.monotonic() + options.seconds)
    study.say({"name": "provenance", **provenance(device)})
    tiny = options.shape == "tiny"
    shape = replace(SHAPES[options.shape], layers=2 if tiny else 4)
    if tiny:
        shape = replace(shape, hidden=256, inner=400, kv_heads=shape.heads)
        thresholds.DENSE_LIMIT = 128
        thresholds.has_matrix_units = linalg.has_matrix_units = lambda like: True
        study.rank = 2
    hidden, inner = shape.hidden, shape.inner
    with (
        mock.patch.dict(SHAPES, {"study": shape}),
        torch.no_grad(),
        without_dense(256 if tiny else 512),
    ):
        study.run("thin, square", lambda: thin_products(study, hidden, hidden, 4))
        study.run("thin, wide", lambda: thin_products(study, hidden, inner, 2))
        study.run("thin, large square", lambda: thin_products(study, inner, inner, 2))
        study.run("factors, hidden", lambda: factorizations(study, hidden, inner))
        study.run("factors, inner", lambda: factorizations(study, inner, hidden))
        study_solves(study, "flat", shape.layers, from_model(shape, device, tiny))
        study_solves(study, "falling", 0, lambda n: made_up(shape, device, n))
    return 0


if __name__ == "__main__":
    sys.exit(main())
