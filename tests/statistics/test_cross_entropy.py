"""Losses a few positions at a time, against PyTorch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorainit.statistics.loss import cross_entropy
from lorainit.statistics.loss.cross_entropy import token_losses
from lorainit.statistics.memory.peak import LiveBytes
from lorainit.types import IGNORED

VOCABULARY = 37


def some(count: int = 23, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets of which some count for nothing, and weights of the losses."""
    rng = torch.Generator().manual_seed(0)
    logits = (torch.randn(count, VOCABULARY, generator=rng) * 4).to(dtype)
    targets = torch.randint(0, VOCABULARY, (count,), generator=rng)
    targets[::5] = IGNORED
    return logits, targets, torch.rand(count, generator=rng)


def reference(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="none")
    (losses * weights).sum().backward()
    assert wide.grad is not None
    return losses.detach(), wide.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("piece", [1, 100, 2**22], ids="pieces of {}".format)
def test_losses_and_gradients_are_pytorchs(
    dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_AT_ONCE", piece)
    logits, targets, weights = some(dtype=dtype)
    wanted, slope = reference(logits, targets, weights)
    leaf = logits.requires_grad_()
    losses = token_losses(leaf, targets)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5)
    assert not bool(losses[::5].any())
    (losses * weights.to(losses)).sum().backward()
    assert leaf.grad is not None
    # One rounding, in the logits' own dtype.
    rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
    # Below it a half-precision number loses digits of its own.
    floor = max(torch.finfo(dtype).smallest_normal, 1e-6)
    torch.testing.assert_close(leaf.grad.double(), slope, rtol=max(rounding, 1e-5), atol=floor)


def test_the_gradient_is_rounded_once() -> None:
    """As PyTorch's, whose softmax is in float32: no entry differs by more than its last digit."""
    logits, targets, weights = some(dtype=torch.bfloat16)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    (token_losses(ours, targets) * weights).sum().backward()
    plain = F.cross_entropy(theirs.float(), targets, ignore_index=IGNORED, reduction="none")
    (plain * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert float((ours.grad != theirs.grad).float().mean()) < 0.01


def test_a_vocabulary_takes_little_more_than_its_gradient() -> None:
    logits = torch.randn(64, 20_000).bfloat16().requires_grad_()
    targets = torch.randint(0, 20_000, (64,))
    nbytes = logits.numel() * logits.element_size()

    def peak(losses: object) -> float:
        with LiveBytes() as meter:
            losses(logits, targets).sum().backward()  # type: ignore[operator]
        logits.grad = None
        return meter.peak / nbytes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_AT_ONCE", 40_000)
        assert peak(token_losses) < 1.5
    assert peak(lambda x, y: F.cross_entropy(x.float(), y, reduction="none")) > 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_does_not_count_need_not_be_finite(bad: float) -> None:
    """A sequence's last position predicts nothing, and an ignored one is nobody's."""
    logits, targets, weights = some()
    spoiled = logits.clone()
    spoiled[::5] = bad
    found = []
    for one in (logits, spoiled):
        leaf = one.requires_grad_()
        losses = token_losses(leaf, targets)
        (losses * weights).sum().backward()
        assert leaf.grad is not None
        found.append((losses.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_no_positions_have_no_losses() -> None:
    logits = torch.zeros(0, VOCABULARY, requires_grad=True)
    assert token_losses(logits, torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_a_target_outside_the_vocabulary_is_an_error() -> None:
    logits, targets, _ = some()
    targets[1] = VOCABULARY
    with pytest.raises((IndexError, RuntimeError)):
        token_losses(logits, targets)
