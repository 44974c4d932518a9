"""What is around a call changes nothing: autocast, a compiled model."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lorainit
from lorainit.models import state
from tests.statistics import models
from tests.statistics.models import all_linear, batches, sequences

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = [
    lorainit.EVA(),
    lorainit.CorDA(),
    lorainit.LoraDA(),
    lorainit.Natural(),
    lorainit.PiSSA(),
]


def started(model: Any, method: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    wrapped = lorainit.get_peft_model(
        model, all_linear(), method=method, data=batches(sequences(), 3), progress=False
    )
    return peft.get_peft_model_state_dict(wrapped)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_autocast_around_a_start(method: Any) -> None:
    expected = started(models.llama(), method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = started(models.llama(), method)
        assert torch.is_autocast_enabled("cpu")
    assert_same(found, expected)


@pytest.mark.parametrize(
    "needs", [{"input_second_moment", "input_mean"}, {"gradient"}], ids=["inputs", "gradient"]
)
def test_autocast_of_the_models_own(needs: set[str]) -> None:
    """A model whose forward is under autocast, as a trainer leaves it: sums are float32 all the same."""
    model = models.llama()
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    data = batches(sequences(), 3)
    settings: Any = {"data": data, "needs": needs, "progress": False}
    found = lorainit.collect_statistics(model, all_linear(), **settings)
    expected = lorainit.collect_statistics(models.llama(), all_linear(), **settings)
    for name, layer in expected.items():
        for need in needs:
            sums, exact = getattr(found[name], need), getattr(layer, need)
            assert sums.dtype == torch.float32
            assert float((sums - exact).norm() / exact.norm()) < 3e-2
    # The control: a product under it is rounded.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["in place", "wrapped"])
@pytest.mark.parametrize("method", [METHODS[0], METHODS[3]], ids=["EVA", "Natural"])
def test_a_compiled_model(method: Any, kind: str) -> None:
    """It runs eagerly, is compiled afterwards as before, and its adapter's names are the model's."""
    runs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal runs
        runs += 1
        return graph.forward

    def start(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["layers.0", "layers.1"])
        wrapped = lorainit.get_peft_model(model, config, method=method, data=data, progress=False)
        return peft.get_peft_model_state_dict(wrapped)

    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(8, 5, generator=generator), "labels": torch.arange(8) % 3}] * 2
    torch._dynamo.reset()
    # Whatever ran before in this process.
    torch.compiler.set_stance("default")
    model: nn.Module = models.Perceptron()
    expected = start(models.Perceptron())
    if kind == "in place":
        model.compile(backend=backend)
    else:
        model = torch.compile(model, backend=backend)
    assert_same(start(model), expected)
    assert runs == 0
    model(x=data[0]["x"])
    assert runs > 0


def test_the_compilers_stance_survives_starts_that_overlap() -> None:
    """One begins while another works and ends after it, as in two threads."""

    def compiled_runs(enter: Any) -> int:
        torch._dynamo.reset()
        torch.compiler.set_stance("default")
        runs = 0

        def backend(graph: Any, inputs: Any) -> Any:
            nonlocal runs
            runs += 1
            return graph.forward

        first, second = enter(), enter()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
        torch.compiler.set_stance("default")
        return runs

    assert compiled_runs(state._eager) > 0
