"""A device without float64, and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorainit
from lorainit.adapters.anchor import AnchoredA, AnchoredB
from tests.adapters.tiny import METHODS, batch, config, llama, logits, start, train

pytestmark = pytest.mark.filterwarnings("ignore")


class _NoFloat64(TorchDispatchMode):
    """A stand-in for MPS: tensors of more than one row are float32 at most, or an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                raise TypeError(f"{func}: the MPS framework doesn't support float64")
        return out


@contextmanager
def no_float64() -> Iterator[None]:
    with _NoFloat64():
        yield


def test_the_stand_in_refuses_float64() -> None:
    with no_float64(), pytest.raises(TypeError, match="float64"):
        torch.ones(2).double()


@pytest.mark.parametrize("method", [METHODS["zero-b"], METHODS["default"], METHODS["anchored"]])
def test_collecting_installing_and_training_need_no_float64(method: Any) -> None:
    """All that runs on the device but the solves: hooks, sums, anchors, the model itself."""
    statistics = lorainit.collect_statistics(
        llama(),
        config(),
        data=[batch()],
        needs=lorainit.FILet().needs | {"gradient", "input_mean"},
        progress=False,
    )
    assert all(
        getattr(layer, field).dtype == torch.float32
        for layer in statistics.values()
        for field in layer.TENSORS
        if getattr(layer, field) is not None
    )
    with no_float64():
        lorainit.collect_statistics(
            llama(),
            config(),
            data=[batch()],
            needs=lorainit.FILet().needs | {"gradient", "input_mean"},
            progress=False,
        )
    wrapped = start(llama(), method)
    with no_float64():
        train(wrapped)
        logits(wrapped)
        wrapped.merge_adapter()


def test_the_anchored_pair_compiles_whole() -> None:
    torch._dynamo.reset()
    pair = nn.Sequential(
        AnchoredA(torch.randn(3, 8)), AnchoredB(torch.randn(5, 3), torch.randn(5, 3))
    )
    compiled = torch.compile(pair, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8)
    torch.testing.assert_close(compiled(x), pair(x))
    compiled(x).sum().backward()
    assert pair[0].trained.grad is not None


@pytest.mark.parametrize("kind", [pytest.param("displaced", marks=pytest.mark.slow), "anchored"])
def test_the_wrapped_model_compiles_without_a_graph_break(kind: str) -> None:
    wrapped = train(start(llama(), METHODS[kind]))
    inputs = batch(seed=9)
    torch._dynamo.reset()
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**inputs).logits, wrapped(**inputs).logits, rtol=1e-5, atol=1e-6
        )
    compiled(**inputs).loss.backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)


def test_a_graph_break_would_be_seen() -> None:
    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Breaks(), fullgraph=True, backend="eager")(torch.ones(2))
