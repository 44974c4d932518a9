"""Weights in eight floating bits, and layers that have no ``weight``: read as their forward uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import lorainit
from lorainit.adapters.weights import fingerprints, read_weight
from lorainit.errors import AdapterError
from tests.adapters import tiny
from tests.untouched import untouched

FP8 = torch.float8_e4m3fn
TARGETS = ["q_proj", "up_proj", "down_proj"]


class EightBits(nn.Linear):
    """An eight-bit weight with scales: one number, one a row, or one a block."""

    def __init__(self, old: nn.Linear, scale: str | None, dtype: torch.dtype = FP8) -> None:
        super().__init__(old.in_features, old.out_features, bias=False, device="meta")
        rows, columns = old.weight.shape
        self.name = scale
        self.block = (rows if scale == "one" else 8, columns if scale != "block" else 8)
        if scale == "row":
            self.block = (1, columns)
        weight = old.weight.detach()
        self.scale = torch.ones(-(-rows // self.block[0]), -(-columns // self.block[1]))
        if scale is not None:
            largest = torch.zeros_like(self.scale)
            for i in range(self.scale.shape[0]):
                for j in range(self.scale.shape[1]):
                    a, b = self.block
                    part = weight[i * a : (i + 1) * a, j * b : (j + 1) * b]
                    largest[i, j] = part.abs().max() / 100
            self.scale = largest
        self.weight = nn.Parameter((weight / self.whole_scale()).to(dtype), requires_grad=False)
        if scale == "block":
            self.block_size = self.block
            self.weight_scale_inv = nn.Parameter(self.scale, requires_grad=False)
        elif scale is not None:
            shaped = self.scale.reshape(()) if scale == "one" else self.scale
            self.weight_scale = nn.Parameter(shaped, requires_grad=False)

    def whole_scale(self) -> Tensor:
        rows, columns = self.out_features, self.in_features
        a, b = self.block
        return self.scale.repeat_interleave(a, 0)[:rows].repeat_interleave(b, 1)[:, :columns]

    def plain(self) -> Tensor:
        return self.weight.float() * self.whole_scale()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.plain().to(x))


class Packed(nn.Module):
    """No ``weight``: integers of four bits, zeros and scales of groups of inputs, as GPTQ and AWQ have them."""

    breaks = False

    def __init__(self, old: nn.Linear, group: int = 8) -> None:
        super().__init__()
        self.out_features, self.in_features = old.weight.shape
        self.group = group
        weight = old.weight.detach().mT.reshape(-1, group, self.out_features)
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scales = (high - low).clamp_min(1e-6) / 15
        self.register_buffer("qweight", ((weight - low) / scales).round().int())
        self.register_buffer("scales", scales)
        self.register_buffer("qzeros", low)
        bias = torch.linspace(-1, 1, self.out_features)
        self.register_buffer("bias", bias)

    def plain(self) -> Tensor:
        return (self.qweight * self.scales + self.qzeros).flatten(0, 1).mT

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks and x.dim() == 2:
            raise RuntimeError("no kernel\nfor this device")
        return F.linear(x, self.plain().to(x), self.bias.to(x))


KINDS: dict[str, Any] = {
    "no scale": lambda old: EightBits(old, None),
    "no scale, e5m2": lambda old: EightBits(old, None, torch.float8_e5m2),
    "one scale": lambda old: EightBits(old, "one"),
    "a scale a row": lambda old: EightBits(old, "row"),
    "a scale a block": lambda old: EightBits(old, "block"),
    "packed": Packed,
}


def model(kind: str, plain: bool = False) -> Any:
    """The tiny Llama with its targets stored otherwise; or their numbers in plain layers."""
    found = tiny.llama()
    for name, module in list(found.named_modules()):
        if name.endswith(tuple(TARGETS)):
            new = KINDS[kind](module)
            if plain:
                dense = nn.Linear(module.in_features, module.out_features, bias=kind == "packed")
                dense.weight = nn.Parameter(new.plain())
                if kind == "packed":
                    dense.bias = nn.Parameter(new.bias)
                new = dense
            found.set_submodule(name, new)
    return found.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_as_the_forward_uses_them(kind: str) -> None:
    stored = model(kind)
    layer = stored.model.layers[0].mlp.down_proj
    with untouched(stored):
        found = read_weight(layer, "down_proj")
        prints = fingerprints({"down_proj": layer})
    torch.testing.assert_close(found.float(), layer.plain(), rtol=1e-5, atol=1e-6)
    assert prints["down_proj"].isfinite().all()
    other = model(kind).model.layers[1].mlp.down_proj
    assert (found.float() - other.plain()).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["of weights", "statistics", "inputs"])
def test_starts_are_those_of_plain_layers(kind: str, method: str) -> None:
    methods: dict[str, Any] = {
        "of weights": lorainit.PiSSA(),
        "statistics": lorainit.LoraGA(),
        "inputs": lorainit.EVA(rho=1),
    }
    if kind == "packed":
        # PEFT adapts such layers by classes of their own libraries: the statistics' side alone.
        arguments: dict[str, Any] = {"data": [tiny.batch()], "progress": False}
        needs = methods[method].needs or {"gradient"}
        config = LoraConfig(r=2, target_modules=TARGETS)
        first, second = (
            lorainit.collect_statistics(model(kind, plain), config, needs=needs, **arguments)
            for plain in (False, True)
        )
        for name in first.names:
            torch.testing.assert_close(first.fingerprints[name], second.fingerprints[name])
        return
    config = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS)
    found = []
    for plain in (False, True):
        base = model(kind, plain)
        wrapped = lorainit.get_peft_model(
            base, config, method=methods[method], data=[tiny.batch()], progress=False
        )
        if methods[method].needs != {"input_second_moment", "input_mean"}:
            torch.testing.assert_close(tiny.logits(wrapped), tiny.logits(model(kind, plain)))
        found.append(deltas(wrapped))
    assert found[0].keys() == found[1].keys()
    for name, delta in found[0].items():
        torch.testing.assert_close(delta, found[1][name], rtol=1e-3, atol=1e-5)
        assert delta.any()


def deltas(wrapped: PeftModel) -> dict[str, Tensor]:
    found = {}
    for name, module in wrapped.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = (getattr(m["default"], "trained", m["default"].weight) for m in
                    (module.lora_A, module.lora_B))  # fmt: skip
            found[name] = (b @ a if b.any() else a.mT @ a).detach().float()
    return found


def test_a_weight_that_cannot_be_read_stops_those_who_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Methods of inputs and gradients start such layers; the others say which one it is."""
    from lorainit.adapters.targets import match_targets
    from lorainit.solve.layers import solve_layers

    config = LoraConfig(r=2, target_modules=TARGETS)
    base = model("packed")
    monkeypatch.setattr(Packed, "breaks", True)
    found = lorainit.collect_statistics(
        base, config, data=[tiny.batch()], needs={"gradient", "input_second_moment", "input_mean"},
        progress=False,
    )  # fmt: skip
    assert not found.fingerprints
    found.save(tmp_path / "s.safetensors")
    targets = match_targets(base, config).layers
    for method in (lorainit.EVA(rho=1), lorainit.LoraGA()):
        factors, sizes = solve_layers(targets, found, method, progress=False)
        assert factors.keys() == targets.keys() == sizes.keys()
        assert all(f.A.any() for f in factors.values())
    for other in (lorainit.PiSSA(), lorainit.LoraGA(scale="weightS")):
        with pytest.raises(
            AdapterError, match=r"q_proj.* cannot be dequantized: no kernel\. Leave"
        ):
            solve_layers(targets, found, other, progress=False)
