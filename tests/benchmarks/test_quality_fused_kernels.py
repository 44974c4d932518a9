"""The fused kernels against their plain counterparts; on a CPU under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from benchmarks.quality.data.order import batch_order
from benchmarks.quality.data.pools import pools_from_examples
from benchmarks.quality.initialization import start_of
from benchmarks.quality.training import fused_kernels as fused
from benchmarks.quality.training import llama
from benchmarks.quality.training.optimizer import adamw as plain_adamw
from benchmarks.quality.training.trainer import Job, StackTrainer

import lorainit
from tests.benchmarks.test_quality_trainer import PAD, base_model, examples, wrapped

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compare(plain, quick, *inputs, tolerance=1e-5):
    """Outputs and the gradients of a random functional of them."""
    results = []
    for function in (plain, quick):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(3)
        weights = [torch.randn(o.shape, generator=generator).to(o) for o in out]
        sum((o * w).sum() for o, w in zip(out, weights, strict=True)).backward()
        results.append([*out, *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def random(*shape):
    return torch.randn(*shape, device=DEVICE)


def test_add_norm():
    torch.manual_seed(0)
    weight = random(24)
    compare(
        lambda x, y: llama._add_norm(x, y, weight, 1e-5),
        lambda x, y: fused.add_norm(x, y, weight, 1e-5),
        random(2, 5, 24),
        random(2, 5, 24),
    )


def test_add_norm_with_a_wider_residual_sum():
    torch.manual_seed(0)
    weight = random(24).bfloat16()
    compare(
        lambda x, y: llama._add_norm(x, y, weight, 1e-5),
        lambda x, y: fused.add_norm(x, y, weight, 1e-5),
        random(2, 5, 24),
        random(2, 5, 24).bfloat16(),
        tolerance=2e-2,
    )


def test_gated():
    torch.manual_seed(0)
    compare(llama._gated, fused.gated, random(2, 3, 2 * 1100))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (9, 3)])
def test_rotate(heads, kv_heads):
    torch.manual_seed(0)
    length, width, rows = 5, 8, 4
    angle = random(length, width // 2)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    arguments = (cos, sin, rows, heads, kv_heads)
    compare(
        lambda x: llama._rotate(x, *arguments),
        lambda x: fused.rotate(x, *arguments),
        random(2, rows // 2 * length, (heads + 2 * kv_heads) * width),
    )


@pytest.mark.parametrize("masked", [False, True])
def test_adamw_is_torchs(masked):
    torch.manual_seed(0)
    stack, size = 3, 2500
    start, live = random(stack, size), (torch.rand(size, device=DEVICE) > 0.5).float()
    rates = torch.tensor([1e-3, 1e-2, 0.1], device=DEVICE)[:, None]
    scale = torch.tensor([1.0, 0.5, 2.0], device=DEVICE)[:, None]
    gradients = [random(stack, size) for _ in range(4)]
    found = []
    for update in (plain_adamw, fused.adamw):
        w, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        for i, g in enumerate(gradients):
            step = torch.tensor([i + 1.0], device=DEVICE)
            update(w, w, g, m, v, live if masked else None, scale, rates, step)
        found.append(w)
    leaves = [row.clone().requires_grad_() for row in start]
    for i, leaf in enumerate(leaves):
        optimizer = torch.optim.AdamW([leaf], lr=float(rates[i]), weight_decay=0)
        for g in gradients:
            leaf.grad = g[i] * scale[i] * (live if masked else 1)
            optimizer.step()
    torch.testing.assert_close(found[0], torch.stack(leaves).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [lorainit.Orthogonal(), lorainit.PiSSA()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_step_is_the_plain_one(method, dtype):
    """Loss, gradients and weights of whole steps; the residual sum is float32 in both."""
    start = start_of(wrapped(method, 0))
    assert_fused_is_plain(
        lambda fuse: llama.StackedLlama(base_model().to(DEVICE), dtype, fuse=fuse), start, dtype
    )


def assert_fused_is_plain(build, start, dtype):
    """Two steps of the base that `build` makes with fused kernels, beside those without."""
    pools = pools_from_examples({"train": examples(8, 1)}, PAD)
    found = []
    for fuse in (False, True):
        trainer = StackTrainer(
            build(fuse), stack=1, rank=4, anchored=start.anchored, scaling=3.0,
            train=pools["train"], batch_size=2, max_steps=2, warmup=0.0, clip=1.0,
            evaluation_rows=2, graphs=False,
        )  # fmt: skip
        outcome = trainer.run([Job(start, 1e-2, batch_order(8, 8, 0, 2, 2))])[0]
        found.append((outcome.train_loss, trainer.adapters.gradient.float().flatten()))
    (losses, gradient), (other_losses, other_gradient) = found
    wide = dtype == torch.float32
    assert losses == pytest.approx(other_losses, rel=1e-5 if wide else 1e-2)
    cosine = torch.nn.functional.cosine_similarity(gradient, other_gradient, 0)
    assert cosine > (1 - 1e-5 if wide else 0.99)
