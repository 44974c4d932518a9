"""Gemma's fused kernels against their plain counterparts; on a CPU under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

# First: it skips all this where there is no Triton, and chooses the interpreter where there is no accelerator.
from tests.benchmarks.test_quality_fused_kernels import (  # isort: skip
    DEVICE,
    assert_fused_is_plain,
    compare,
    random,
)

from benchmarks.quality.initialization import start_of
from benchmarks.quality.training import fused_gemma as fused
from benchmarks.quality.training import gemma

import lorainit
from tests.benchmarks.test_quality_gemma import base_model, wrapped


@pytest.mark.parametrize("narrow", [False, True])
def test_add_norms(narrow):
    torch.manual_seed(0)
    gains = random(24), random(24)
    y = random(2, 5, 24)
    compare(
        lambda x, y: gemma._add_norms(x, y, *gains, 1e-5),
        lambda x, y: fused.add_norms(x, y, *gains, 1e-5),
        random(2, 5, 24),
        y.bfloat16() if narrow else y,
        tolerance=3e-2 if narrow else 1e-5,
    )


def test_gated():
    torch.manual_seed(0)
    compare(gemma._gated, fused.gated, 3 * random(2, 3, 2 * 1100))


def test_a_gate_far_from_zero_stays_finite():
    values = torch.tensor([-300.0, -30.0, 0.0, 30.0, 300.0], device=DEVICE)
    compare(gemma._gated, fused.gated, torch.cat((values, torch.ones(5, device=DEVICE)))[None])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2), (3, 3)])
def test_rotate(heads, kv_heads):
    torch.manual_seed(0)
    length, width, rows = 5, 8, 4
    angle = random(length, width // 2)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    arguments = (random(2, width), cos, sin, rows, heads, kv_heads, 1e-5)
    compare(
        lambda x: gemma._rotate(x, *arguments),
        lambda x: fused.rotate(x, *arguments),
        random(2, rows // 2 * length, (heads + 2 * kv_heads) * width),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_step_is_the_plain_one(dtype):
    """Loss, gradients and weights of whole steps; the residual sum is float32 in both."""
    assert_fused_is_plain(
        lambda fuse: gemma.StackedGemma(base_model().to(DEVICE), dtype, fuse=fuse),
        start_of(wrapped(lorainit.Orthogonal(), 0)),
        dtype,
    )
