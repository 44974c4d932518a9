"""Weights that wait on the host: a graph keeps none of them on the device, and gradients are the same."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lorainit
from lorainit.adapters import weights
from lorainit.adapters.targets import match_targets
from lorainit.adapters.weights import read_weight
from lorainit.data.sampling import draw_sample
from lorainit.models.introspection import input_device
from lorainit.models.resident import fetched_again, offloaded_bytes, offloading, resident
from lorainit.solve.ownership import device_of
from lorainit.solve.stacks import solving_bytes
from lorainit.statistics.memory.block_plan import BlockPlan, make_block_plan
from lorainit.statistics.memory.peak import LiveBytes
from lorainit.statistics.memory.plan import BatchSize
from lorainit.statistics.memory.rehearsal import Rehearsal, rehearse
from tests.measuring import subject
from tests.statistics import models
from tests.statistics.test_blocks import layers_of


class _Elsewhere(dict[str, Tensor]):
    """Offloaded weights; each is copied when it is fetched, as from a host to a device."""

    fetched = 0

    def __getitem__(self, key: str) -> Tensor:
        type(self).fetched += 1
        return super().__getitem__(key).clone()


def offloaded(model: nn.Module) -> nn.Module:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for part in model.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        if getattr(hook, "offload", False):
            names = [name for name, _ in part.named_parameters(recurse=False)]
            hook.weights_map = _Elsewhere({name: hook.weights_map[name] for name in names})
            # Copies of one weight have addresses of their own.
            hook.tied_params_names = set()
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, models.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def gradient_of_embeddings(model: nn.Module) -> tuple[Tensor, int, int]:
    """Gradient of what the embedding gives; bytes that wait for the backward; weights fetched by it."""
    kept: list[Tensor] = []
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(
        lambda m, args, output: kept.append(output.requires_grad_()) or None
    )
    gc.disable()
    try:
        with LiveBytes() as meter:
            loss = model(**batch(), use_cache=False).loss
            waiting, fetched = meter.live, _Elsewhere.fetched
            (gradient,) = torch.autograd.grad(loss, kept[0])
    finally:
        gc.enable()
        handle.remove()
    return gradient, waiting, _Elsewhere.fetched - fetched


def frozen(build: Callable[..., nn.Module]) -> nn.Module:
    return build(torch.float64).requires_grad_(False)


@pytest.mark.parametrize("build", [models.llama, models.gpt2])
@pytest.mark.parametrize("again", [True, False])
def test_a_graph_keeps_no_offloaded_weights(build: Callable[..., nn.Module], again: bool) -> None:
    truth, own, _ = gradient_of_embeddings(frozen(build))
    model = offloaded(frozen(build))
    total, largest = offloaded_bytes(model)
    inside: AbstractContextManager[None] = fetched_again(model) if again else nullcontext()
    with inside:
        found, waiting, fetched = gradient_of_embeddings(model)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)
    assert all(weight.is_meta for weight in model.parameters())
    if again:
        assert fetched > 0
        assert waiting - own <= largest
    else:
        assert fetched == 0
        assert waiting - own > total / 2
    hooks = [h for m in model.modules() if (h := getattr(m, "_hf_hook", None)) is not None]
    assert not any({"pre_forward", "post_forward"} & set(vars(hook)) for hook in hooks)


def test_a_resident_block_is_not_fetched_again() -> None:
    model = offloaded(frozen(models.llama))
    block = model.model.layers[0]  # type: ignore[index, union-attr]
    weights = sum(1 for _ in block.parameters())
    with fetched_again(model), resident(block):
        before = _Elsewhere.fetched
        gradient_of_embeddings(model)
        elsewhere = _Elsewhere.fetched - before
    # What is outside of the block is fetched forward and for the backward of what needs it.
    with fetched_again(model):
        before = _Elsewhere.fetched
        gradient_of_embeddings(model)
    # Norms' weights are vectors, which their backward reads too.
    assert _Elsewhere.fetched - before == elsewhere + 2 * weights
    assert offloaded_bytes(block)[0] == sum(p.numel() * 8 for p in block.parameters())


def test_nothing_is_done_where_nothing_is_offloaded() -> None:
    model = frozen(models.llama)
    with fetched_again(model):
        loss = model(**batch()).loss
    assert offloaded_bytes(model) == (0, 0)
    assert isinstance(loss, Tensor)


@pytest.mark.parametrize("place", [torch.device("cuda", 1), "cuda:1"])
def test_inputs_go_where_offloaded_weights_are_used(place: Any) -> None:
    model = offloaded(frozen(models.llama))
    assert input_device(model) == torch.device("cpu")
    for part in model.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        if hook is not None:
            hook.execution_device = place
    assert input_device(model) == torch.device("cuda", 1)


def test_a_rehearsal_tells_fetched_weights_from_what_a_batch_takes() -> None:
    needs = lorainit.LoraDA().needs
    rows = draw_sample([batch()], None).batches[0].first_row()
    own, model = frozen(models.llama), offloaded(frozen(models.llama))
    plain, found = (rehearse(subject(m, layers_of(m), needs), rows) for m in (own, model))
    layers = model.model.layers  # type: ignore[union-attr]
    blocks = [offloaded_bytes(layer)[0] for layer in layers]  # type: ignore[union-attr]
    assert plain.taken.weights == 0
    assert found.taken.weights == max(*blocks, offloaded_bytes(model)[1])
    # Had they been counted with the positions, a batch would seem to take several times as much.
    assert found.taken.block == pytest.approx(plain.taken.block, rel=0.1)
    assert plain.taken.block * rows.positions < max(blocks)
    peaks = [planned(rehearsal, layers_of(own), needs).peak for rehearsal in (plain, found)]
    rest = found.taken.block - plain.taken.block, found.taken.forward - plain.taken.forward
    assert peaks[1] - peaks[0] == pytest.approx(found.taken.weights, abs=100 * max(*rest, 1.0))


def planned(
    rehearsal: Rehearsal, modules: Mapping[str, nn.Module], needs: frozenset[str]
) -> BlockPlan:
    found = make_block_plan(
        {n: (m.out_features, m.in_features) for n, m in modules.items()},  # type: ignore[misc]
        needs,
        1 << 40,
        rehearsal,
        device=torch.device("cpu"),
        positions=100,
        batches=[BatchSize(positions=100)],
    )
    assert found is not None
    return found


@pytest.mark.parametrize("place", [torch.device("meta"), "meta"])
def test_offloaded_layers_are_solved_where_they_are_used(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where they wait: a device solves in seconds what a processor takes minutes for."""
    monkeypatch.setattr(weights, "all_finite", lambda weight: True)
    model = offloaded(frozen(models.llama))
    targets = match_targets(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).layers
    assert {device_of(t).type for t in targets.values()} == {"cpu"}
    for part in model.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        if hook is not None:
            hook.execution_device = place
    for name, target in targets.items():
        assert device_of(target) == torch.device(place)
        assert read_weight(target.module, name).device.type == "meta"


def test_a_solve_counts_the_weight_that_it_fetches() -> None:
    """Which is not there beside the statistics as those of a model on the device are."""
    config = LoraConfig(r=2, target_modules=["down_proj"])
    found = []
    for model in (frozen(models.llama), offloaded(frozen(models.llama))):
        targets = match_targets(model, config).layers
        found.append(solving_bytes(targets, lorainit.LoraDA()))
    (target, *_) = targets.values()
    assert found[1] - found[0] == 2 * target.spec.out_features * target.spec.in_features * 8


def test_a_hook_beside_the_one_that_offloads_hides_nothing() -> None:
    """accelerate joins hooks in a `SequentialHook`, which has none of their attributes; joined twice, too."""
    alone, beside = offloaded(frozen(models.llama)), offloaded(frozen(models.llama))
    for part in list(beside.modules()):
        if hasattr(part, "_hf_hook"):
            for _ in range(2):
                accelerate.hooks.add_hook_to_module(part, accelerate.hooks.ModelHook(), append=True)
    assert len(list(offloading(beside))) == len(list(offloading(alone))) > 0
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    first, second = (match_targets(model, config).layers for model in (alone, beside))
    for name, target in first.items():
        assert device_of(second[name]) == device_of(target)
        weight = read_weight(second[name].module, name)
        assert torch.equal(weight, read_weight(target.module, name))
    for value, other in zip(
        gradient_of_embeddings(alone), gradient_of_embeddings(beside), strict=True
    ):
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other))
