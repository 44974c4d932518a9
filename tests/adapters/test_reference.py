"""The full-precision weights of a quantized base: where they are read from, what is refused, what is found."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import lorainit
from lorainit.adapters import tensor_sources
from lorainit.adapters.targets import match_targets
from lorainit.adapters.weights import read_weight
from lorainit.errors import AdapterError, MissingStatisticError
from lorainit.solve import stacks
from lorainit.types import LayerStatistics
from tests.adapters.tiny import assert_same_bits, base_weights, batch, config, llama, logits, start

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def rounded(weight: Tensor, levels: int = 3) -> Tensor:
    """Rounded to nearest in groups of 16, `levels` on each side of zero."""
    groups = weight.reshape(-1, 16)
    step = groups.abs().amax(-1, keepdim=True) / levels
    return ((groups / step).round() * step).reshape(weight.shape)


def quantized(full: nn.Module, levels: int = 3) -> Any:
    model = copy.deepcopy(full)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and "lm_head" not in name:
                module.weight.copy_(rounded(module.weight, levels))
    return model


def tensors(full: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in full.state_dict().items()}


def checkpoint(full: Any, folder: Path) -> Path:
    full.save_pretrained(folder)
    return folder


def one_file(full: Any, folder: Path) -> Path:
    full.save_pretrained(folder)
    return folder / "model.safetensors"


def in_shards(full: Any, folder: Path) -> Path:
    full.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def shards_without_index(full: Any, folder: Path) -> str:
    in_shards(full, folder)
    (folder / "model.safetensors.index.json").unlink()
    return str(folder)


def without_prefix(full: Any, folder: Path) -> dict[str, Tensor]:
    del folder
    return {name.removeprefix("model."): tensor for name, tensor in tensors(full).items()}


def with_prefix(full: Any, folder: Path) -> dict[str, Tensor]:
    del folder
    return {f"base_model.{name}": tensor for name, tensor in tensors(full).items()}


def function(full: Any, folder: Path) -> Callable[[str], Tensor]:
    del folder
    return lambda name: full.get_submodule(name).weight


SOURCES: dict[str, Callable[[Any, Path], Any]] = {
    "folder": checkpoint,
    "file": one_file,
    "shards": in_shards,
    "shards without an index": shards_without_index,
    "mapping": lambda full, folder: tensors(full),
    "mapping without a prefix": without_prefix,
    "mapping with a prefix": with_prefix,
    "model": lambda full, folder: full,
    "inner model": lambda full, folder: full.model,
    "function": function,
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_start(source: str, tmp_path: Path) -> None:
    full = llama()
    found = start(
        quantized(full), lorainit.LoftQ(), reference_weights=SOURCES[source](full, tmp_path)
    )
    for name, target in match_targets(full, config()).layers.items():
        layer = found.get_base_model().get_submodule(name)
        error = target.module.weight.double() - layer.base_layer.weight.double()
        u, s, vh = torch.linalg.svd(error)
        wanted = (u[:, :4] * s[:4]) @ vh[:4]
        torch.testing.assert_close(
            layer.get_delta_weight("default").double(), wanted, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    "method", [lorainit.LoftQ(), lorainit.QERA(), lorainit.KroneckerQER()], ids=lambda m: type(m).__name__
)  # fmt: skip
def test_the_start_is_that_of_the_layer_alone(method: Any) -> None:
    """Layers in stacks, with the statistics of the quantized model, against each layer by itself."""
    full = llama()
    base = quantized(full)
    found = start(base, method, reference_weights=full)
    statistics = None
    if method.needs:
        statistics = lorainit.collect_statistics(
            quantized(full), config(), data=[batch()], needs=method.needs, progress=False
        )
    for name, target in match_targets(full, config()).layers.items():
        layer = found.get_base_model().get_submodule(name)
        weight = layer.base_layer.weight.detach()
        own = LayerStatistics() if statistics is None else statistics[name]
        own = dataclasses.replace(own, weight_error=target.module.weight.detach() - weight)
        wanted = method.solve(weight, own, 4, 2.0)
        delta = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(delta, 2 * wanted.B @ wanted.A, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "method", [lorainit.LoftQ(), lorainit.QERA("diagonal"), lorainit.QERA(), lorainit.KroneckerQER()], ids=str
)  # fmt: skip
def test_outputs_come_nearer_and_the_base_stays(method: Any) -> None:
    full = llama()
    base = quantized(full)
    before, wanted = base_weights(base), logits(full)
    far = (logits(base) - wanted).norm()
    found = start(base, method, reference_weights=full)
    assert (logits(found) - wanted).norm() < 0.85 * far
    assert_same_bits(base_weights(found), before)


def test_full_rank_is_the_full_precision_model() -> None:
    full = llama()
    lora = config(r=32, lora_alpha=32)
    found = start(quantized(full), lorainit.QERA(), lora, reference_weights=full, cap_rank=True)
    torch.testing.assert_close(logits(found), logits(full), rtol=1e-3, atol=1e-4)


def test_conv1d_is_read_either_way_round(tmp_path: Path) -> None:
    """GPT-2's weights are ``(in, out)`` in files; its square ones tell by their values."""
    torch.manual_seed(0)
    full = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    ).eval()
    full.save_pretrained(tmp_path)
    lora = config(target_modules=["c_attn", "c_fc", "c_proj"])
    found = [
        start(quantized(full), lorainit.LoftQ(), lora, reference_weights=source)
        for source in (tmp_path, full, lambda name: full.get_submodule(name).weight.mT)
    ]
    for name in match_targets(full, lora).layers:
        one, *others = (
            m.get_base_model().get_submodule(name).get_delta_weight("default") for m in found
        )
        assert all(torch.equal(one, other) for other in others)
        assert one.norm() > 0
    square = "transformer.h.0.attn.c_proj"
    assert full.get_submodule(square).weight.shape == (32, 32)
    delta = found[0].get_base_model().get_submodule(square).get_delta_weight("default")
    weight = full.get_submodule(square).weight
    error = weight - rounded(weight)
    assert (error - delta).norm() < 0.9 * error.norm()


def test_never_a_second_model_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's weight is read when it is solved, and gone when the next is."""
    full = llama()
    checkpoint(full, tmp_path)
    held: list[weakref.ref[Tensor]] = []
    most: list[int] = []
    read = tensor_sources.CheckpointTensors.read

    def watched(self: Any, name: str, rows: int | None = None) -> Tensor:
        most.append(sum(one() is not None for one in held))
        found = read(self, name, rows)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(tensor_sources.CheckpointTensors, "read", watched)
    monkeypatch.setattr(stacks, "_STACK_BYTES", 1)
    start(quantized(full), lorainit.LoftQ(), reference_weights=tmp_path)
    assert len(most) == 28
    assert max(most) <= 1
    assert not any(one() is not None for one in held)


def changed(full: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    found = tensors(full)
    found[name] = change(found[name])
    return found


Q = f"{NAMES[1]}.weight"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda full: changed(full, Q, lambda w: w[:-1]), r"has shape \(31, 32\); layer .*layers\.1"),
        (lambda full: {k: v for k, v in tensors(full).items() if k != Q}, r"hold no '.*layers\.1.*\(1 of 14"),
        (lambda full: {"other.weight": torch.zeros(3)}, "hold for example 'other.weight'"),
        (lambda full: {}, "hold for example 'nothing'"),
        (lambda full: changed(full, Q, lambda w: w.flip(0)), r"differs from the base's by 1\.\d\d .*\(1 of 14"),
        (lambda full: tensors(llama(seed=5)), r"by 1\.\d\d of its norm.*\(14 of 14"),
        (lambda full: changed(full, Q, lambda w: w / 0), "is not what was quantized"),
        (lambda full: quantized(full), "nothing to give back"),
        (lambda full: changed(full, Q, lambda w: w.to(torch.float8_e4m3fn)), "quantized itself"),
        (lambda full: changed(full, Q, lambda w: (100 * w).to(torch.int8)), "quantized itself"),
        (lambda full: 3, "cannot be a int"),
        (lambda full: lambda name: None, "gave a NoneType for layer"),
        (lambda full: "nowhere/at/all", "is no folder and no file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_not_the_reference_is_refused(source: Any, message: str) -> None:
    full = llama()
    with pytest.raises(AdapterError, match=message):
        start(quantized(full), lorainit.LoftQ(), reference_weights=source(full))


def test_refused_before_any_data_is_looked_at() -> None:
    def data() -> Any:
        raise AssertionError("data was read")
        yield

    full = llama()
    with pytest.raises(AdapterError, match="is not what was quantized"):
        start(quantized(full), lorainit.QERA(), data=data(), reference_weights=llama(seed=5))


def test_coarse_rounding_is_still_the_reference() -> None:
    """Three values a group take two thirds of the norm: more than another model would be refused for."""
    full = llama()
    base = quantized(full, levels=1)
    name = NAMES[0]
    weight = full.get_submodule(name).weight
    assert (weight - base.get_submodule(name).weight).norm() > 0.4 * weight.norm()
    start(base, lorainit.LoftQ(), reference_weights=full)


@pytest.mark.parametrize("kind", ["no safetensors", "no index", "shard missing", "damaged"])
def test_a_broken_checkpoint_is_named(kind: str, tmp_path: Path) -> None:
    full = llama()
    in_shards(full, tmp_path)
    index, shard = (
        tmp_path / "model.safetensors.index.json",
        sorted(tmp_path.glob("*.safetensors"))[0],
    )
    if kind == "no safetensors":
        for file in tmp_path.glob("*.safetensors*"):
            file.unlink()
        message = "holds no safetensors file"
    elif kind == "no index":
        index.write_text("[]", encoding="utf-8")
        message = "is no index of shards"
    elif kind == "shard missing":
        shard.unlink()
        message = f"{shard.name}' is not there"
    else:
        index.unlink()
        shard.write_bytes(b"nothing")
        message = f"{shard.name}' cannot be read as safetensors"
    with pytest.raises(AdapterError, match=message):
        start(quantized(full), lorainit.LoftQ(), reference_weights=tmp_path)


def test_methods_and_references_have_to_fit() -> None:
    full = llama()
    with pytest.raises(MissingStatisticError, match="QERA needs the weights that the base was"):
        start(quantized(full), lorainit.QERA())
    with pytest.raises(AdapterError, match="PiSSA reads no reference_weights"):
        start(quantized(full), lorainit.PiSSA(), reference_weights=full)


def test_only_the_rows_that_are_asked_for_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(12.0).reshape(4, 3)}, tmp_path / "x.safetensors")
    found = tensor_sources.CheckpointTensors(tmp_path).read("a", 2)
    assert torch.equal(found, load_file(tmp_path / "x.safetensors")["a"][:2])


def test_a_float8_weight_is_read_with_its_scales() -> None:
    """transformers' fine-grained form: blocks of 16 x 32, of which the last are shorter."""

    class Float8(nn.Linear):
        block_size = (16, 32)

    layer = Float8(40, 24, bias=False)
    weight = layer.weight.detach().clone()
    scales = torch.rand(2, 2) + 0.5
    whole = scales.repeat_interleave(16, 0)[:24].repeat_interleave(32, 1)[:, :40]
    layer.weight = nn.Parameter((weight / whole).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scales)
    assert (read_weight(layer, "x") - weight).norm() < 0.04 * weight.norm()
    layer.block_size = None
    layer.weight_scale_inv = nn.Parameter(torch.tensor(2.0))
    assert torch.equal(read_weight(layer, "x"), 2 * layer.weight.float())
    del layer.weight_scale_inv
    layer.weight_scale = nn.Parameter(torch.full((24, 1), 3.0))
    assert torch.equal(read_weight(layer, "x"), 3 * layer.weight.float())


def test_what_cannot_be_read_is_named() -> None:
    """A packed layer, as GPTQ and AWQ have them, without a weight."""

    class Packed(nn.Module):
        in_features, out_features = 8, 8

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))

    with pytest.raises(AdapterError, match=r"layer 'a\.b' \(Packed\) cannot be dequantized"):
        read_weight(Packed(), "a.b")
