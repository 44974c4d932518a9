"""Four-bit layers that bitsandbytes packs for inference, as an evaluation does on CPUs with AVX512-BF16.

A packed layer rounds its scales and passes no gradient on. All tests but the last run on any CPU.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import lorainit
from lorainit.adapters.targets import match_targets
from lorainit.cli.shared import mean_loss
from lorainit.models import packed_layers
from lorainit.models.packed_layers import plain_layout
from lorainit.models.state import measuring
from tests.adapters.tiny import batch, llama, logits, start
from tests.life.test_quantized_kinds import config, quantized, stored
from tests.measuring import held_out

pytestmark = pytest.mark.filterwarnings("ignore")

kinds = pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4"])
evaluated_before = pytest.mark.parametrize("evaluated", [False, True])


def four_bits(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}


def packable(kind: str, *, evaluated: bool = False) -> Any:
    """A Llama whose layers are large enough to be packed, on a CPU that packs."""
    model = quantized(kind, llama(width=128))
    for layer in four_bits(model).values():
        layer.support_avx512bf16_for_cpu = True
        if evaluated:
            weight = layer.weight
            weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(
                weight.data, weight.quant_state
            )
    return model


def dequantized(model: nn.Module) -> Any:
    plain = llama(width=128)
    with torch.no_grad():
        for name, weight in stored(model).items():
            plain.get_submodule(name).weight.copy_(weight)
    return plain


def layouts(model: nn.Module) -> dict[str, Any]:
    """All that packing, or its inverse, changes of a layer."""
    return {
        name: (
            layer.support_avx512bf16_for_cpu,
            layer.weight.data_ptr(),
            layer.weight.shape,
            layer.weight.numpy().tobytes(),
            id(layer.weight.quant_state),
            {
                key: value.tolist() if isinstance(value, Tensor) else value
                for key, value in vars(layer.weight.quant_state).items()
            },
        )
        for name, layer in four_bits(model).items()
    }


def packed(model: nn.Module) -> set[bool]:
    states = (layer.weight.quant_state for layer in four_bits(model).values())
    return {getattr(state, "packing_format_for_cpu", False) for state in states}


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    assert (found - wanted).norm() < tolerance * wanted.norm()


@kinds
@evaluated_before
def test_statistics_are_those_of_the_dequantized_model(kind: str, evaluated: bool) -> None:
    model = packable(kind, evaluated=evaluated)
    plain, before = dequantized(model), layouts(model)
    needs = lorainit.Natural().needs | lorainit.FILet().needs
    found, wanted = (
        lorainit.collect_statistics(m, config(), data=[batch()], needs=needs, progress=False)
        for m in (model, plain)
    )
    assert len(wanted) == 14
    for name in wanted:
        for field in needs:
            assert_near(getattr(found[name], field), getattr(wanted[name], field))
    assert layouts(model) == before
    assert packed(model) == {evaluated}


def test_a_pass_without_labels_packs_nothing() -> None:
    model = packable("nf4")
    before = layouts(model)
    needs = lorainit.QERA().needs
    lorainit.collect_statistics(model, config(), data=[batch()], needs=needs, progress=False)
    assert layouts(model) == before


@kinds
@evaluated_before
def test_losses_are_those_of_the_dequantized_model(kind: str, evaluated: bool) -> None:
    model = packable(kind, evaluated=evaluated)
    plain, before = dequantized(model), layouts(model)
    losses = []
    for base in (model, plain):
        modules = {n: t.module for n, t in match_targets(base, config()).layers.items()}
        with held_out(base, modules, [batch()]).measuring() as loss:
            losses.append(loss({}))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert mean_loss(model, [batch()]) == pytest.approx(mean_loss(plain, [batch()]), rel=1e-6)
    assert layouts(model) == before


@evaluated_before
@pytest.mark.parametrize("method", [lorainit.Natural(), lorainit.LoraDA(), lorainit.QERA()])
def test_starts_are_those_of_the_dequantized_model(method: Any, evaluated: bool) -> None:
    model, full = packable("nf4", evaluated=evaluated), llama(width=128)
    plain, before = dequantized(model), layouts(model)
    # The same rows four times: a step is measured on what it was found by, and helps.
    more: dict[str, Any] = {"data": [batch()] * 4}
    if isinstance(method, lorainit.QERA):
        more["reference_weights"] = full
    found, wanted = (start(m, method, config(), **more) for m in (model, plain))
    for name in before:
        first, second = (
            m.get_base_model().get_submodule(name).get_delta_weight("default")
            for m in (found, wanted)
        )
        assert_near(first, second, tolerance=1e-2)
    assert list(layouts(model).values()) == list(before.values())


@evaluated_before
def test_whatever_happens_the_layers_are_as_they_were(evaluated: bool) -> None:
    model = packable("nf4-double", evaluated=evaluated)
    before = layouts(model)

    def interrupted() -> None:
        with measuring(model):
            assert packed(model) == {False}
            with measuring(model):
                logits(model)
            logits(model)
            assert packed(model) == {False}
            with measuring(model):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert layouts(model) == before


def test_layers_that_share_a_weight_are_as_they_were() -> None:
    model = packable("nf4", evaluated=True)
    first, second = (model.model.layers[i].mlp for i in range(2))
    second.up_proj.weight = first.up_proj.weight
    before = layouts(model)
    with measuring(model):
        logits(model)
        assert packed(model) == {False}
    assert layouts(model) == before


def test_a_layer_that_cannot_be_unpacked_leaves_the_others_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = packable("nf4", evaluated=True)
    before = layouts(model)
    left = iter(range(5))

    def failing(weight: Any) -> Any:
        if next(left, None) is None:
            raise MemoryError
        return plain_layout(weight)

    monkeypatch.setattr(packed_layers, "plain_layout", failing)
    with pytest.raises(MemoryError), measuring(model):
        pass
    assert layouts(model) == before


def test_a_trainers_batches_are_drawn_unpacked(tmp_path: Any) -> None:
    """On-policy trainers answer prompts meanwhile, in eval mode."""
    from peft import get_peft_model

    model = get_peft_model(packable("nf4"), config())
    seen: list[bool] = []

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        logits(model)
        seen.extend(packed(model))
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    rows = [{key: value[i] for key, value in batch().items()} for i in range(6)]
    settings = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=collate)
    lorainit.start_trainer(trainer, lorainit.LoraDA(), progress=False)
    assert seen
    assert not any(seen)
    assert all(layer.support_avx512bf16_for_cpu for layer in four_bits(model).values())


@pytest.mark.skipif(not functional.has_avx512bf16(), reason="this CPU packs nothing")
def test_evaluations_before_and_after_are_the_same() -> None:
    """The evaluation itself packs; why it matters: a packed layer passes no gradient on."""
    model = quantized("nf4", llama(width=128))
    for layer in four_bits(model).values():
        layer.support_avx512bf16_for_cpu = Linear4bit(1, 1).support_avx512bf16_for_cpu
    lorainit.collect_statistics(model, config(), data=[batch()], needs={"gradient"}, progress=False)
    assert packed(model) == {False}
    before = logits(model)
    assert packed(model) == {True}
    layer = copy.deepcopy(model.model.layers[0].mlp.up_proj)
    x = torch.randn(1, 128, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is None
    lorainit.collect_statistics(model, config(), data=[batch()], needs={"gradient"}, progress=False)
    assert torch.equal(logits(model), before)
