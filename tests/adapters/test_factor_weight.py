"""What is read and written under PEFT's names of an anchored adapter is the adapter (CASES C1, C8)."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call, grad

from lorainit.adapters.anchor import AnchoredFactor
from lorainit.adapters.anchored_kinds import AnchoredA, AnchoredB, give_anchor
from tests.adapters.tiny import METHODS, batch, config, llama, logits, start, train

RANK, IN, OUT = 3, 7, 5


def factor(kind: type[AnchoredFactor], experts: int = 1) -> AnchoredFactor:
    rank = RANK * experts
    shape = (rank, IN) if kind is AnchoredA else (OUT, rank)
    new = nn.Linear(shape[1], shape[0], bias=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        new.weight.copy_(torch.randn(shape, generator=generator))
    give_anchor(
        new,
        "A" if kind is AnchoredA else "B",
        torch.randn(shape, generator=generator),
        experts=experts,
    )
    assert isinstance(new, AnchoredFactor)
    return new


def expected_whole(of: AnchoredFactor) -> Tensor:
    """Expert by expert, written down by hand."""
    a, b = of._parameters["weight"].detach(), of.anchor
    if isinstance(of, AnchoredA):
        pairs = zip(a.split(RANK), b.split(RANK), strict=True)
        return torch.cat([part for pair in pairs for part in pair])
    # PEFT lays experts inside: column k * experts + e.
    columns = [a[:, k] for k in range(a.shape[1])] + [b[:, k] for k in range(b.shape[1])]
    return torch.stack(columns, dim=1)


KINDS = pytest.mark.parametrize("kind", [AnchoredA, AnchoredB])
BOTH = pytest.mark.parametrize(
    ("kind", "experts"), [(AnchoredA, 1), (AnchoredB, 1), (AnchoredA, 4), (AnchoredB, 4)]
)

WRITES: dict[str, Callable[[AnchoredFactor, Tensor], Any]] = {
    "data.copy_": lambda f, x: f.weight.data.copy_(x),
    "data =": lambda f, x: setattr(f.weight, "data", x.clone()),
    "weight =": lambda f, x: setattr(f, "weight", nn.Parameter(x.clone())),
    "no_grad copy_": lambda f, x: f.weight.detach().copy_(x),
    "data.zero_ then add_": lambda f, x: f.weight.data.zero_().add_(x),
    "data.mul_, data.add_": lambda f, x: (f.weight.data.mul_(0), f.weight.data.add_(x)),
    "data[:]": lambda f, x: f.weight.data.__setitem__(slice(None), x),
    "row by row": lambda f, x: [row.copy_(y) for row, y in zip(f.weight.data, x, strict=True)],
    "data[i].copy_": lambda f, x: [f.weight.data[i].copy_(x[i]) for i in range(len(x))],
    "data.T": lambda f, x: f.weight.data.T.copy_(x.T),
    "chunks": lambda f, x: [
        p.copy_(y) for p, y in zip(f.weight.data.chunk(2), x.chunk(2), strict=True)
    ],
    "out=": lambda f, x: torch.mul(x, 1, out=f.weight.data),
    "foreach": lambda f, x: (
        torch._foreach_zero_([f.weight.data]),
        torch._foreach_add_([f.weight.data], [x]),
    ),
    "init": lambda f, x: (nn.init.zeros_(f.weight), f.weight.data.add_(x)),
    "state dict": lambda f, x: f.load_state_dict({"weight": x}),
    "state dict, assigned": lambda f, x: f.load_state_dict({"weight": x}, assign=True),
    "get_parameter": lambda f, x: f.get_parameter("weight").data.copy_(x),
}
NEW_PARAMETER = {"weight =", "state dict, assigned"}
"""As with PEFT's own factors, these put another parameter in the place."""


@BOTH
def test_reading_gives_both_halves(kind: type[AnchoredFactor], experts: int) -> None:
    one = factor(kind, experts)
    whole = expected_whole(one)
    assert one.weight.shape == whole.shape == (one.out_features, one.in_features)
    for found in (one.weight.detach() + 0, one.weight.data.clone(), one.state_dict()["weight"]):
        assert torch.equal(found, whole)
    assert isinstance(one.weight, nn.Parameter)
    assert [(n, p.shape) for n, p in one.named_parameters()] == [("weight", one.anchor.shape)]
    assert not list(one.buffers())


@BOTH
@pytest.mark.parametrize("how", WRITES)
def test_writing_is_seen_by_both_halves(kind: type[AnchoredFactor], experts: int, how: str) -> None:
    one = factor(kind, experts)
    other = factor(kind, experts)
    held = one._parameters["weight"]
    weight = one.weight
    other._parameters["weight"].data.mul_(2)
    other.anchor.add_(1)
    WRITES[how](one, expected_whole(other))
    assert torch.equal(one._parameters["weight"], other._parameters["weight"])
    assert torch.equal(one.anchor, other.anchor)
    assert one._parameters["weight"].is_contiguous()
    # What was read before shows what is there now, and an optimizer's parameter is still the one.
    assert torch.equal(weight.detach() + 0, expected_whole(other))
    assert (one._parameters["weight"] is held) == (how not in NEW_PARAMETER)


@KINDS
def test_writing_under_inference_mode(kind: type[AnchoredFactor]) -> None:
    one = factor(kind)
    with torch.inference_mode():
        one.weight.data.zero_()
        assert not one.weight.any()
    assert not one.anchor.any()
    assert not one.anchor.is_inference()


def test_a_plain_copy_of_the_weight_would_not_do() -> None:
    """The negative control: what was read before was the halves, joined once."""
    one = factor(AnchoredA)
    one.joined().data.zero_()
    assert one.anchor.all()


@BOTH
def test_gradients_flow_to_the_trained_half_alone(kind: type[AnchoredFactor], experts: int) -> None:
    one = factor(kind, experts)
    (one.weight**2).sum().backward()
    torch.testing.assert_close(one.trained.grad, 2 * one.trained.detach())
    grad = one.weight.grad
    assert grad is not None
    assert grad.shape == one.weight.shape
    one.weight.grad *= 2
    torch.testing.assert_close(one.trained.grad, 4 * one.trained.detach())
    one.weight.grad.zero_()
    assert not one.trained.grad.any()
    one.weight.grad = None
    assert one.trained.grad is None
    one.weight.requires_grad_(False)
    assert not one.trained.requires_grad
    one.weight.requires_grad = True
    assert one.trained.requires_grad


class Fused(torch.autograd.Function):
    """As fused LoRA kernels are written: both factors are taken by name, the gradients made by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b)
        return x @ a.t() @ b.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, a, b = ctx.saved_tensors
        return grad @ b @ a, (grad @ b).t() @ x, grad.t() @ (x @ a.t())


def test_a_fused_kernel_that_reads_the_factors_by_name_trains_them() -> None:
    a, b = factor(AnchoredA), factor(AnchoredB)
    x = torch.randn(4, IN)
    out = Fused.apply(x, a.weight, b.weight)
    torch.testing.assert_close(out, b(a(x)))
    out.square().sum().backward()
    found = [one.trained.grad.clone() for one in (a, b)]
    for one in (a, b):
        one.zero_grad()
    b(a(x)).square().sum().backward()
    for one, expected in zip((a, b), found, strict=True):
        torch.testing.assert_close(expected, one.trained.grad)
        assert expected.any()


def test_what_cannot_work_says_so() -> None:
    one = factor(AnchoredA)
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([one.weight], lr=0.1)
    with pytest.raises(RuntimeError, match="named_parameters"):
        one.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(RuntimeError, match="slots"):
        torch.utils.swap_tensors(one.weight, torch.zeros(6, IN))
    with pytest.raises(ValueError, match="read-only"):
        one.weight.detach().numpy()[:] = 0
    with pytest.raises(RuntimeError, match="twice the rank"):
        one.weight.data = torch.zeros(6, IN + 1)
    with pytest.raises(RuntimeError, match="twice the rank"):
        one.load_state_dict({"weight": torch.zeros(RANK, IN)})
    with pytest.raises(RuntimeError, match="must match"):
        one.weight.data.copy_(torch.zeros(RANK, IN))
    assert one.anchor.all()


@KINDS
def test_a_weight_of_another_rank_makes_it_plain(kind: type[AnchoredFactor]) -> None:
    """As with PEFT's factors, whose rank changes then: what was the start is overwritten."""
    one = factor(kind)
    held = one.trained
    new = torch.randn((4, IN) if kind is AnchoredA else (OUT, 4))
    one.weight.data = new
    assert type(one) is nn.Linear
    assert one.weight is held
    assert torch.equal(one.weight, new)
    x = torch.randn(2, new.shape[1])
    assert torch.equal(one(x), x @ new.T)


def test_copies_of_the_weight_are_tensors_of_their_own() -> None:
    one = factor(AnchoredA)
    whole = expected_whole(one)
    file = io.BytesIO()
    torch.save({"weight": one.weight.data}, file)
    file.seek(0)
    for found in (
        copy.deepcopy(one.weight),
        pickle.loads(pickle.dumps(one.weight)),
        torch.load(file)["weight"],
    ):
        assert type(found) in (Tensor, nn.Parameter)
        assert torch.equal(found, whole)
        found.data.zero_()
    assert torch.equal(expected_whole(one), whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.to(torch.bfloat16),
        lambda f: f.double(),
        copy.deepcopy,
        lambda f: pickle.loads(pickle.dumps(f)),
        lambda f: f.share_memory(),
        lambda f: f.to("meta").to_empty(device="cpu"),
    ],
    ids=["bfloat16", "float64", "deepcopy", "pickle", "shared", "meta"],
)
def test_the_anchor_moves_with_the_factor(change: Callable[[nn.Module], Any]) -> None:
    one = factor(AnchoredB)
    dtypes = {torch.float32, torch.bfloat16, torch.float64}
    whole = expected_whole(one)
    new = change(one)
    assert type(new) is AnchoredB
    assert new.anchor.dtype == new.trained.dtype
    assert new.anchor.dtype in dtypes
    assert new.anchor.device.type == "cpu"
    if new.weight.dtype == torch.float64:
        assert torch.equal(expected_whole(new).float(), whole)


@pytest.fixture(scope="module")
def trained() -> PeftModel:
    return train(start(llama(), METHODS["anchored"], config(target_modules=["q_proj", "up_proj"])))


def test_names_of_parameters_are_those_of_the_state_dict(trained: PeftModel) -> None:
    parameters, state = dict(trained.named_parameters()), trained.state_dict()
    assert set(parameters) <= set(state)
    anchored = [n for n, p in parameters.items() if p.shape != state[n].shape]
    assert len(anchored) == 8
    assert all("lora_" in name for name in anchored)


@pytest.mark.parametrize("names", ["parameters", "state dict"])
def test_functional_call(trained: PeftModel, names: str) -> None:
    given = dict(trained.named_parameters()) if names == "parameters" else trained.state_dict()
    inputs = batch(seed=9)
    live = trained.eval()(**inputs).logits
    assert torch.equal(functional_call(trained, given, kwargs=inputs).logits, live)
    if names == "state dict":
        # Without any B, neither half's, it is the base model.
        off = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in given.items()}
        found = functional_call(trained, off, kwargs=inputs).logits
        assert torch.equal(found, llama()(**inputs).logits)
    else:
        off = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in given.items()}
        assert not torch.equal(functional_call(trained, off, kwargs=inputs).logits, live)
    assert torch.equal(trained(**inputs).logits, live)


def test_gradients_of_functional_call(trained: PeftModel) -> None:
    inputs = batch(seed=9)
    values = {n: p.detach() for n, p in trained.named_parameters()}
    found = grad(lambda p: functional_call(trained, p, kwargs=inputs).loss)(values)
    trained.zero_grad()
    trained(**inputs).loss.backward()
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded_into_another_start(trained: PeftModel, assign: bool) -> None:
    other = start(llama(), METHODS["anchored-weight"], config(target_modules=["q_proj", "up_proj"]))
    held = dict(other.named_parameters())
    other.load_state_dict(trained.state_dict(), assign=assign)
    assert torch.equal(logits(other), logits(trained))
    parameters = dict(other.named_parameters())
    assert {n: p.shape for n, p in parameters.items()} == {n: p.shape for n, p in held.items()}
    name = next(n for n in held if "lora_A" in n)
    assert (parameters[name] is held[name]) != assign
    assert all(p.is_contiguous() for p in parameters.values())
    train(other)
    assert not torch.equal(logits(other), logits(trained))


def test_a_whole_model_pickled(trained: PeftModel) -> None:
    file = io.BytesIO()
    torch.save(trained, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(logits(again), logits(trained))


def test_offloaded_after_the_start(trained: PeftModel) -> None:
    accelerate = pytest.importorskip("accelerate")
    live = logits(trained)
    model = copy.deepcopy(trained)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(logits(model), live)


def test_reset_by_peft(trained: PeftModel) -> None:
    """`reset_lora_parameters` writes a random A and a zero B: then the adapter adds nothing."""
    model = copy.deepcopy(trained)
    for module in model.modules():
        if hasattr(module, "reset_lora_parameters"):
            module.reset_lora_parameters("default", True)
    assert torch.equal(logits(model), logits(llama()))
    assert all(
        module.lora_A["default"].weight.std() > 0
        for module in model.modules()
        if hasattr(module, "lora_A")
    )


def test_the_optimizer_holds_as_much_as_plain_loras() -> None:
    def states(method: Any) -> int:
        model = start(llama(), method)
        optimizer = torch.optim.AdamW(model.parameters())
        model(**batch()).loss.backward()
        optimizer.step()
        return sum(value.numel() for state in optimizer.state.values() for value in state.values())

    assert states(METHODS["anchored"]) == states(METHODS["zero-b"])
