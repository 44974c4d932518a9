"""A device without float64, memory that does not do, and torch.compile."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import lorainit
from lorainit.adapters.anchored_kinds import give_anchor
from lorainit.methods.table import STARTS
from tests.adapters.tiny import METHODS, batch, config, llama, logits, start, train
from tests.life.fake_mps import OnMps, moved, mps
from tests.methods.contract import DRAWN
from tests.untouched import untouched

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
    pair = nn.Sequential(nn.Linear(8, 3, bias=False), nn.Linear(3, 5, bias=False))
    give_anchor(pair[0], "A", torch.randn(3, 8))
    give_anchor(pair[1], "B", torch.randn(5, 3))
    compiled = torch.compile(pair, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8)
    torch.testing.assert_close(compiled(x), pair(x))
    compiled(x).sum().backward()
    assert pair[0].trained.grad is not None


@pytest.mark.parametrize("kind", [pytest.param("displaced", marks=pytest.mark.slow), "anchored"])
def test_the_wrapped_model_compiles_without_a_graph_break(kind: str) -> None:
    # One layer has a factor of every kind.
    wrapped = train(start(llama(layers=1), METHODS[kind]))
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


@pytest.fixture(scope="module")
def everything() -> lorainit.Statistics:
    """What every method reads."""
    needs = frozenset().union(*(method().needs for method in lorainit.METHODS.values()))
    return lorainit.collect_statistics(
        llama(), config(), data=[batch()], needs=needs, progress=False
    )


def test_the_stand_in_for_mps_is_a_device_without_float64() -> None:
    x = OnMps(torch.randn(3, 4))
    with mps(), torch.no_grad():
        assert x.device.type == torch.ones(2, device="mps").device.type == "mps"
        assert (x @ x.mT).device.type == torch.ones(2).to("mps").device.type == "mps"
        assert x.cpu().double().dtype == x.to("cpu", torch.float64).dtype == torch.float64
        for wide in (x.double, lambda: torch.zeros(2, device="mps", dtype=torch.float64)):
            with pytest.raises(TypeError, match="float64"):
                wide()
        with pytest.raises(TypeError, match="float64"):
            torch.ones(2).double().to("mps")
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3, 4)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("name", lorainit.METHODS)
def test_every_method_starts_a_model_on_mps(
    name: str, precision: Any, everything: lorainit.Statistics
) -> None:
    method = lorainit.METHODS[name]()
    arguments: dict[str, Any] = {"statistics": everything, "precision": precision}
    if getattr(method, "needs_reference", False):
        full = {
            n: p.detach() * (1 + 0.1 * p.detach().sign()) for n, p in llama().named_parameters()
        }
        arguments["reference_weights"] = full
    if getattr(method, "calibrated", False):
        arguments["data"] = [batch(seed=3)]
    torch.manual_seed(0)
    expected = start(llama(), method, config(), **arguments)
    torch.manual_seed(0)
    with mps():
        found = start(moved(llama()), method, config(), **arguments)
        factors = {n: p.detach() for n, p in found.named_parameters() if "lora_" in n}
        assert {p.device.type for p in factors.values()} == {"mps"}
        on_cpu = {n: p.cpu() for n, p in factors.items()}
    for key, parameter in expected.named_parameters():
        if "lora_" in key:
            torch.testing.assert_close(on_cpu[key], parameter.detach(), rtol=1e-6, atol=1e-8)


# --- a model that lies on two devices, as `device_map` cuts it ------------------------------------


def on_two_devices() -> nn.Module:
    """The second block on the device; what goes in and comes out is moved, as accelerate's hooks do."""
    model = llama()
    block = model.model.layers[1]
    moved(block)

    def to_device(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda t: t.to("mps") if isinstance(t, torch.Tensor) else t, (args, kwargs))

    block.register_forward_pre_hook(to_device, with_kwargs=True)
    block.register_forward_hook(lambda module, args, out: tree_map(lambda t: t.cpu(), out))
    return model


OF_STATISTICS = [
    n
    for n in STARTS
    if n not in (*DRAWN, "auto") and not getattr(lorainit.METHODS[n](), "needs_reference", False)
]


@torch.no_grad()
@pytest.mark.parametrize("name", OF_STATISTICS)
def test_every_method_starts_a_model_on_two_devices(
    name: str, everything: lorainit.Statistics
) -> None:
    """From statistics: layers of one shape are solved where they lie, and installed there."""
    method = lorainit.EVA(rho=1.0) if name == "eva" else lorainit.METHODS[name]()
    given = {"statistics": everything} if method.needs else {"data": None}
    torch.manual_seed(0)
    expected = start(llama(), method, config(), **given)
    torch.manual_seed(0)
    with mps():
        found = start(on_two_devices(), method, config(), **given)
        places = {n: p.device.type for n, p in found.named_parameters() if "lora_" in n}
        assert all((place == "mps") == (".layers.1." in n) for n, place in places.items())
        factors = {n: p.cpu() for n, p in found.named_parameters() if "lora_" in n}
    for key, parameter in expected.named_parameters():
        if "lora_" in key:
            torch.testing.assert_close(factors[key], parameter, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_a_pass_over_two_devices() -> None:
    """Of the inputs alone: the stand-in has no autograd. Every layer's sums lie where the layer does."""
    data, method = [batch(), batch(seed=5)], lorainit.EVA(rho=1.0)
    expected = start(llama(), method, config(), data=data)
    with mps():
        found = start(on_two_devices(), method, config(), data=data)
        factors = {n: p.cpu() for n, p in found.named_parameters() if "lora_" in n}
    for key, parameter in expected.named_parameters():
        if "lora_A" in key:
            torch.testing.assert_close(factors[key], parameter, rtol=1e-4, atol=1e-5)


# --- memory that does not do --------------------------------------------------------------------


class Hungry(lorainit.LoraDA):
    """There is memory for so many layers at a time, and on the CPU for one."""

    layers = 1
    on_device = 0
    solved: list[int]

    def solve(self, weight: torch.Tensor, *arguments: Any) -> Any:
        count = math.prod(weight.shape[:-2])
        if count > (self.layers if weight.device.type == "cpu" else self.on_device):
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
        type(self).solved.append(count)
        return super().solve(weight, *arguments)


def hungry(layers: int, on_device: int = 0) -> Any:
    kind = type("Hungry", (Hungry,), {"layers": layers, "on_device": on_device, "solved": []})
    return kind()


@pytest.mark.parametrize(("layers", "sizes"), [(1, {1}), (2, {2}), (8, {2, 4})])
def test_a_solve_without_memory_is_cut_and_said(
    layers: int, sizes: set[int], caplog: pytest.LogCaptureFixture, everything: lorainit.Statistics
) -> None:
    method = hungry(layers)
    with caplog.at_level("WARNING", logger="lorainit"):
        found = start(llama(), method, config(), statistics=everything)
    expected = start(llama(), lorainit.LoraDA(), config(), statistics=everything)
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-5, atol=1e-6)
    # SplitMatrix of what was tried, not layer by layer.
    assert set(method.solved) == sizes
    assert sum(method.solved) == 14
    said = [record.message for record in caplog.records if "out of memory" in record.message]
    assert bool(said) == (layers < 8)
    for line in said:
        assert "self_attn" in line or "mlp" in line
        assert "at once instead" in line


@torch.no_grad()
def test_a_layer_that_does_not_fit_the_device_is_solved_on_the_cpu(
    caplog: pytest.LogCaptureFixture, everything: lorainit.Statistics
) -> None:
    expected = start(llama(), lorainit.LoraDA(), config(), statistics=everything)
    with mps(), caplog.at_level("WARNING", logger="lorainit"):
        found = start(moved(llama()), hungry(1), config(), statistics=everything)
        factors = {n: p.cpu() for n, p in found.named_parameters() if "lora_" in n}
    assert "out of memory on mps:0" in caplog.text
    assert ": on the CPU instead" in caplog.text
    for key, parameter in expected.named_parameters():
        if "lora_" in key:
            torch.testing.assert_close(factors[key], parameter, rtol=1e-5, atol=1e-7)


def test_a_solve_that_fits_nowhere_installs_nothing(everything: lorainit.Statistics) -> None:
    model = llama()
    with untouched(model), pytest.raises(torch.OutOfMemoryError) as caught:
        start(model, hungry(0), config(), statistics=everything)
    for word in (r"layer 'model.layers", r"shape \(", "exclude_modules"):
        assert caught.match(word)


def test_natural_steps_without_memory_are_cut_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = [batch(rows=6, seed=3)]
    method = lorainit.Natural(steps=1)
    expected = start(llama(), method, config(), data=data)
    whole = lorainit.Natural.step

    def step(self: Any, statistics: Any, rank: int) -> Any:
        if statistics.gradient_sum.shape[0] > 1:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
        return whole(self, statistics, rank)

    monkeypatch.setattr(lorainit.Natural, "step", step)
    with caplog.at_level("WARNING", logger="lorainit"):
        found = start(llama(), method, config(), data=data)
    assert "out of memory" in caplog.text
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_batch_without_memory_is_named_with_what_helps(where: str) -> None:
    model = llama()
    layer = model.model.layers[1].mlp

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB. GPU 0 has 0 bytes free.")

    if where == "forward":
        layer.register_forward_hook(fail)
    else:
        layer.register_forward_hook(lambda m, a, out: out.register_hook(fail) and None)
    with untouched(model), pytest.raises(torch.OutOfMemoryError) as caught:
        start(model, METHODS["displaced"], config(), data=[batch(rows=3, length=7)])
    for word in (
        r"batch 0 \(.*input_ids \(3, 7\)",
        "14 layers",
        "smaller batches",
        "max_memory",
        "gradient_checkpointing_enable",
        "20.00 GiB",
    ):
        assert caught.match(word)
