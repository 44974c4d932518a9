"""Adapters of convolutions: every method's start in PEFT's own layout, through the life of an adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

import lorainit
from lorainit.methods import METHODS
from lorainit.methods.table import STARTS
from tests.adapters.tiny import METHODS as KINDS
from tests.methods.common import relative
from tests.statistics import reference
from tests.statistics.test_convolutions import TARGETS, images, losses, network, single_losses
from tests.untouched import snapshot

CONVOLUTIONS = TARGETS[:4]
READ_WEIGHT = ("pissa", "milora", "olora", "corda", "astra", "filet", "farss")
READ_REFERENCE = ("loftq", "qera", "kronecker-qer", "auto")


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "lora_alpha": 4, "target_modules": TARGETS} | settings))


def data(dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    return [{"x": b["x"].to(dtype), "labels": b["labels"]} for b in images(4, 4)]


def started(method: Any, dtype: torch.dtype = torch.float64, **settings: Any) -> PeftModel:
    return lorainit.get_peft_model(
        network(dtype),
        config(**settings),
        method=method,
        data=data(dtype),
        loss_fn=losses,
        progress=False,
        autocast_adapter_dtype=False,
    )


def trained(model: PeftModel) -> PeftModel:
    """Every trainable parameter moved a little, in a way of its own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def outputs(model: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    out: Tensor = model(data(dtype)[0]["x"]).detach()
    return out


@pytest.mark.parametrize("name", [n for n in STARTS if n not in READ_REFERENCE])
def test_every_method_solves_the_patches_layer(name: str) -> None:
    """The installed kernels are the method's answer to the dense truth of a linear layer over patches.

    That this answer is the method's own optimum is shown of any layer in tests/methods. The control: of
    patches that lie another way the answer is another.
    """
    method = lorainit.EVA(rho=1.0) if name == "eva" else METHODS[name]()
    batches = data()
    truth = reference.reference(network(), CONVOLUTIONS, batches, single_losses)
    statistics = lorainit.collect_statistics(
        network(),
        config(),
        data=batches,
        needs=method.needs or {"gradient"},
        loss_fn=losses,
        progress=False,
    )
    torch.manual_seed(0)
    model = lorainit.get_peft_model(
        network(),
        config(),
        method=method,
        statistics=statistics,
        precision="exact",
        progress=False,
        autocast_adapter_dtype=False,
    )
    for place in CONVOLUTIONS:
        layer = model.base_model.model.get_submodule(place)
        a, b = (
            getattr(f["default"], "trained", f["default"].weight).detach().flatten(1)
            for f in (layer.lora_A, layer.lora_B)
        )
        if name in ("vanilla", "gaussian", "orthogonal", "init-ab", "gora"):
            assert a.shape[1] == truth[place].Sx.shape[0]
            continue
        true = truth[place]

        def answer(order: Tensor, place: str = place, true: Any = true) -> Any:
            weight = network().get_submodule(place).weight.detach().flatten(1)
            if name in READ_WEIGHT:
                weight, order = weight[:, order], torch.arange(len(order))
            dense = lorainit.LayerStatistics.from_means(
                gradient=true.G[:, order],
                input_second_moment=true.Sx[order][:, order],
                input_mean=true.mean[order],
                output_second_moment=true.Sy,
                population=8.0,
            )
            return method.solve(weight, dense, 2, 2.0)

        found = answer(torch.arange(a.shape[1]))
        for got, wanted in ((a.mT @ a, found.A.mT @ found.A), (b @ b.mT, found.B @ found.B.mT)):
            # Lengths that are measured are set to a stated one without data.
            got, wanted = (t / t.norm().clamp_min(1e-30) for t in (got, wanted))
            assert relative(got, wanted) <= 1e-7, place
        if name == "loram":
            # It reads no more of the weight than its size.
            continue
        other = answer(torch.arange(a.shape[1]).flip(0)).A
        gram = (other.mT @ other) / other.norm().square()
        assert relative(a.mT @ a / a.norm().square(), gram) > 1e-2, place


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_life_of_an_adapter(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = network(dtype)
    before = outputs(base, dtype)
    model = started(KINDS[kind], dtype)
    if not kind.startswith("displaced"):
        assert torch.equal(outputs(model, dtype), before)
    weights = {n: p for n, p in model.named_parameters() if "base_layer" in n}
    own = dict(base.named_parameters())
    for name, parameter in weights.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(parameter, own[plain])
    trained(model)
    wanted = outputs(model, dtype)
    assert not torch.equal(wanted, before)
    with model.disable_adapter():
        assert torch.equal(outputs(model, dtype), before)
    model.save_pretrained(tmp_path / "saved")
    near = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.05}
    casting = {"autocast_adapter_dtype": False}
    for read in (PeftModel.from_pretrained, lorainit.load_adapter):
        again = read(network(dtype), tmp_path / "saved", **casting)
        torch.testing.assert_close(outputs(again, dtype), wanted, **near)
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    report = lorainit.export(model, tmp_path / "served")
    again = PeftModel.from_pretrained(network(dtype), tmp_path / "served", **casting)
    torch.testing.assert_close(outputs(again, dtype), wanted, **near)
    assert any("convolution" in line for line in report.objections)
    if dtype == torch.float64:
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(outputs(merged, dtype), wanted, **near)


def test_cut_to_a_lower_rank_is_the_best_of_that_rank(tmp_path: Path) -> None:
    model = trained(started(lorainit.FILet()))
    report = lorainit.export(model, tmp_path, rank=1)
    layer = model.base_model.model.first
    change = layer.get_delta_weight("default").detach().flatten(1)
    values = torch.linalg.svdvals(change)
    least = float(values[1:].norm() / values.norm())
    assert report.errors["first"] == pytest.approx(least, rel=1e-6)
    again = PeftModel.from_pretrained(network(), tmp_path, autocast_adapter_dtype=False)
    cut = again.base_model.model.first.get_delta_weight("default").detach().flatten(1)
    assert float((cut - change).norm() / change.norm()) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize(
    "method", [lorainit.LoraDA(), lorainit.FILet()], ids=["displaced", "anchored"]
)
@pytest.mark.parametrize(
    "extra", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str
)
def test_variants(method: Any, extra: dict[str, Any]) -> None:
    before = outputs(network())
    model = started(method, **extra).eval()
    if isinstance(method, lorainit.FILet):
        torch.testing.assert_close(outputs(model), before, rtol=1e-9, atol=1e-9)
        model.train()
        # Both halves see one mask.
        torch.testing.assert_close(outputs(model), before, rtol=1e-9, atol=1e-9)
        model.eval()
    trained(model)
    wanted = outputs(model)
    if "lora_bias" not in extra:
        merged = model.merge_and_unload()
        torch.testing.assert_close(outputs(merged), wanted, rtol=1e-7, atol=1e-7)


def test_a_layer_smaller_than_the_rank_is_filled_up() -> None:
    """An output of 3 channels at rank 5."""
    model = started(lorainit.FILet(), r=6)
    assert torch.equal(outputs(model), outputs(network()))
    layer = model.base_model.model.first
    assert layer.lora_A["default"].weight.shape == (12, 3, 3, 3)
    assert layer.lora_B["default"].weight.shape == (5, 12, 1, 1)


def test_restart_and_weighted_sums() -> None:
    model = started(lorainit.PiSSA())
    trained(model)
    model = lorainit.get_peft_model(
        model, None, method=lorainit.LoraDA(), data=data(), loss_fn=losses, progress=False
    )
    assert model.base_model.model.first.r["default"] == 2
    lorainit.get_peft_model(
        model, config(), method=lorainit.FILet(), data=data(), loss_fn=losses, adapter_name="other",
        progress=False,
    )  # fmt: skip
    parts = [
        model.base_model.model.third.get_delta_weight(name).detach()
        for name in ("default", "other")
    ]
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "sum", combination_type="cat")
    whole = model.base_model.model.third.get_delta_weight("sum").detach()
    torch.testing.assert_close(whole, parts[0] + 0.5 * parts[1])


def test_the_base_is_untouched() -> None:
    model = network()
    before = snapshot(model)
    lorainit.collect_statistics(
        model, config(), data=data(), needs=lorainit.FILet().needs, loss_fn=losses, progress=False
    )
    assert snapshot(model) == before
