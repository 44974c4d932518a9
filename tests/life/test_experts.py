"""A mixture's experts, stacked in parameters: statistics, starts, saving, each expert for itself."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import lorainit
from lorainit import errors
from lorainit.adapters.targets import match_targets
from lorainit.models.experts import ExpertLayer, routed
from tests import measuring
from tests.adapters.tiny import (
    METHODS,
    assert_same_bits,
    base_weights,
    config,
    logits,
    run_fresh,
    start,
    train,
)
from tests.life.mixtures import FUSED, batch, built, mixtral, pairs, switch
from tests.statistics.reference import causal, sequence_to_sequence
from tests.untouched import unsettle, untouched

pytestmark = pytest.mark.filterwarnings("ignore")

NEEDS = lorainit.FILet().needs | {"gradient", "input_mean", "output_second_moment"}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CHANGES: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "parameters": {"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS},
}


def lora(form: str = "parameters", **changes: Any) -> LoraConfig:
    return config(**({"r": 2} | copy.deepcopy(CHANGES[form]) | changes))


def some(method: Any, model: Any, form: str = "parameters", **arguments: Any) -> PeftModel:
    settings: dict[str, Any] = {"data": [batch()], "on_unused": "default"} | arguments
    if "adapter_name" in settings:
        return start(model, method, **settings)
    return start(model, method, lora(form), **settings)


# --- statistics -----------------------------------------------------------------------------------


class Truth:
    """One module's experts computed densely, every token by every expert that it chose."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.inputs: dict[str, Tensor] = {}
        self.shifts: dict[str, Tensor] = {}

    def product(self, name: str, x: Tensor, chosen: Tensor) -> Tensor:
        weight = getattr(self.owner, name)[chosen]
        form = "tkio,tki->tko" if self.owner.is_transposed else "tkoi,tki->tko"
        y = torch.einsum(form, weight, x)
        if self.owner.has_bias:
            y = y + getattr(self.owner, f"{name}_bias")[chosen]
        self.inputs[name] = x.detach()
        self.shifts[name] = torch.zeros_like(y, requires_grad=True)
        return y + self.shifts[name]

    def forward(self, owner: nn.Module, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        self.chosen = chosen
        x = states[:, None].expand(-1, chosen.shape[1], -1)
        inner = owner._apply_gate(self.product("gate_up_proj", x, chosen))
        y = self.product("down_proj", inner, chosen)
        return (y * weights[..., None]).sum(1).to(states.dtype)


def truths(model: Any, data: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Statistics of every expert from autograd and dense sums; nothing of the library is used."""
    owners = {n: Truth(m) for n, m in model.named_modules() if n.endswith("experts")}
    parameters = {
        f"{n}.{p}": getattr(t.owner, p)
        for n, t in owners.items()
        for p in ("gate_up_proj", "down_proj")
    }
    with ExitStack() as stack:
        for truth in owners.values():
            truth.owner.forward = MethodType(truth.forward, truth.owner)
            stack.callback(delattr, truth.owner, "forward")
        losses = [loss for loss in causal(model, data) if loss is not None]
        shifts = {f"{n}.{p}": z for n, t in owners.items() for p, z in t.shifts.items()}
        total = torch.stack(losses).sum()
        found = torch.autograd.grad(total, [*parameters.values(), *shifts.values()])
    gradients = dict(zip([*parameters, *(f"g {n}" for n in shifts)], found, strict=True))
    counted = data["attention_mask"].bool().reshape(-1)
    out: dict[str, dict[str, Tensor]] = {}
    for key in parameters:
        name, _, parameter = key.rpartition(".")
        truth = owners[name]
        for index in range(truth.owner.num_experts):
            kept = (truth.chosen == index) & counted[:, None]
            if not bool((truth.chosen == index).any()):
                continue
            x, g = truth.inputs[parameter][kept], gradients[f"g {key}"][kept]
            gradient = gradients[key][index] / len(losses)
            out[f"{key}.{index}"] = {
                "gradient": gradient.mT if truth.owner.is_transposed else gradient,
                "input_second_moment": x.mT @ x / max(len(x), 1),
                "input_mean": x.sum(0) / max(len(x), 1),
                "output_second_moment": g.mT @ g / max(len(x), 1),
                "positions": torch.tensor(float(len(x))),
            }
    return out


def collected(model: Any, data: list[dict[str, Tensor]], **settings: Any) -> lorainit.Statistics:
    settings = {"needs": NEEDS, "on_unused": "default", "progress": False} | settings
    return lorainit.collect_statistics(model, lora(), data=data, **settings)


@pytest.mark.parametrize("kind", FUSED)
def test_statistics_are_those_of_autograd(kind: str) -> None:
    model = built(FUSED[kind]).double()
    expected = truths(model, batch())
    assert len(expected) > 8
    with untouched(unsettle(model)):
        found = collected(model, [batch()])
    experts = {name for name in found if "experts" in name}
    assert experts == set(expected)
    for name, truth in expected.items():
        assert float(found[name].positions) == float(truth["positions"]), name
        for field in ("gradient", "input_second_moment", "input_mean", "output_second_moment"):
            torch.testing.assert_close(
                getattr(found[name], field), truth[field], rtol=1e-9, atol=1e-14
            )


def test_padding_does_not_count_and_would_be_seen_if_it_did() -> None:
    model = mixtral().double()
    data = batch()
    rows = [
        {key: value[i : i + 1, row.bool()] for key, value in data.items()}
        for i, row in enumerate(data["attention_mask"])
    ]
    # Nobody predicts a row's first token, but padding on its left would.
    firsts = data["attention_mask"].argmax(1)
    data["labels"][torch.arange(len(firsts)), firsts] = -100
    # Positions are told to the model that sees the rows padded on the left.
    position_ids = (data["attention_mask"].cumsum(1) - 1).clamp_min(0)
    padded = collected(model, [data | {"position_ids": position_ids}])
    alone = collected(model, rows)
    unmasked = collected(model, [{k: v for k, v in data.items() if k != "attention_mask"}])
    differ = 0
    for name in alone:
        for field in ("gradient", "input_second_moment", "output_second_moment"):
            first, second = getattr(padded[name], field), getattr(alone[name], field)
            torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-12)
        differ += padded[name].positions != unmasked[name].positions
    assert differ > 0


@pytest.mark.parametrize("kernel", ["eager", "batched_mm", "grouped_mm"])
def test_the_kernel_that_the_model_uses_does_not_matter(kernel: str) -> None:
    model = mixtral()
    model.set_experts_implementation(kernel)
    found = collected(model, [batch()])
    model.set_experts_implementation("eager")
    expected = collected(model, [batch()])
    for name in expected:
        assert torch.equal(found[name].gradient, expected[name].gradient)


@pytest.mark.parametrize("kind", FUSED)
def test_routed_is_what_the_model_computes(kind: str) -> None:
    model = built(FUSED[kind])
    modules = [t.module for t in match_targets(model, lora()).layers.values()]
    calls: list[str] = []
    for module in modules:
        if isinstance(module, ExpertLayer):
            module.register_forward_hook(lambda m, *_: calls.append(m.parameter))
    with torch.no_grad():
        expected = model(**batch()).logits
        assert not calls
        with untouched(model), routed(modules):
            found = model(**batch()).logits
    assert set(calls) == {"gate_up_proj", "down_proj"}
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    plain = collected(mixtral(), [batch()])
    model = mixtral()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = collected(model.train(), [batch()])
    for name in plain:
        torch.testing.assert_close(found[name].gradient, plain[name].gradient)
        assert found[name].positions == plain[name].positions


def test_several_passes_give_what_one_gives() -> None:
    model = with_idle_experts([3])
    modules = {n: t.module for n, t in match_targets(model, lora()).layers.items()}
    idle = {"on_unused": "default"}
    whole = measuring.collected(model, modules, [batch()], NEEDS, **idle)
    roomy = measuring.planned(model, modules, [batch()], NEEDS, max_memory="1GiB", **idle).plan
    tight = roomy.held + roomy.batch.nbytes // 2 + whole.nbytes // 5
    plan = measuring.planned(model, modules, [batch()], NEEDS, max_memory=tight, **idle).plan
    assert len(plan.passes) > 1
    parts = measuring.collected(model, modules, [batch()], NEEDS, max_memory=tight, **idle)
    for name in whole:
        torch.testing.assert_close(parts[name].gradient, whole[name].gradient)
    assert whole.metadata["unused"]
    assert parts.metadata == whole.metadata


def test_an_accident_leaves_the_experts_as_they_were() -> None:
    model = mixtral()
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    model.model.layers[1].mlp.register_forward_hook(fail)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        collected(model, [batch()])
    assert calls


# --- experts that saw no token ------------------------------------------------------------------


def with_idle_experts(idle: list[int]) -> Any:
    """A model whose first router never chooses these."""
    model = mixtral()
    router = model.model.layers[0].mlp.gate

    def avoid(module: nn.Module, args: Any, output: Any) -> Any:
        scores, weights, chosen = output
        rest = [i for i in range(4) if i not in idle]
        table = torch.tensor([i if i in rest else rest[i % len(rest)] for i in range(4)])
        return scores, weights, table[chosen]

    router.register_forward_hook(avoid)
    return model


@pytest.mark.parametrize("method", ["displaced", "anchored", "zero-b"])
def test_experts_that_saw_no_token_raise_or_keep_pefts_start(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    idle = "model.layers.0.mlp.experts.gate_up_proj.3"
    with untouched(base := with_idle_experts([3])), pytest.raises(errors.TargetError) as caught:
        some(METHODS[method], base, on_unused="raise")
    for word in ("2 target layer", idle, "down_proj.3", "on_unused='default'", "more sequences"):
        assert caught.match(word)

    with caplog.at_level("INFO", logger="lorainit"):
        wrapped = some(METHODS[method], with_idle_experts([3]))
    assert f"{idle}: no sequence reached it" in caplog.text
    deltas = expert_deltas(wrapped)
    assert not deltas[idle].any()
    if method == "displaced":
        idle_ones = {name for name, delta in deltas.items() if not delta.any()}
        assert idle_ones == {idle, idle.replace("gate_up", "down")}
    # The idle expert is not lost: its A is PEFT's, so training moves it once a token comes.
    for module in wrapped.modules():
        if type(module).__name__ == "ParamWrapper":
            assert (
                module.lora_A["default"].weight.reshape(4, -1, module.in_features).any((1, 2)).all()
            )


def test_statistics_without_an_expert_serve_from_a_file(tmp_path: Path) -> None:
    found = collected(with_idle_experts([1, 3]), [batch()])
    found.save(tmp_path / "s.safetensors")
    statistics = lorainit.Statistics.load(tmp_path / "s.safetensors")
    first = some(METHODS["displaced"], mixtral(), data=None, statistics=statistics)
    second = some(METHODS["displaced"], mixtral(), data=None, statistics=found)
    assert torch.equal(logits(first), logits(second))


# --- the adapter --------------------------------------------------------------------------------


def expert_deltas(model: PeftModel) -> dict[str, Tensor]:
    """What the adapter adds to every expert's matrix, ``(out, in)``, by PEFT's own account."""
    from lorainit.adapters.layers import adapter_layers, name_in_patterns

    found = {}
    for name, layer in adapter_layers(model, "default").items():
        if type(layer).__name__ != "ParamWrapper" or layer.num_experts == 1:
            continue
        delta = layer.get_delta_weight("default").detach()
        if layer.get_base_layer().is_transposed:
            delta = delta.mT
        for index, matrix in enumerate(delta):
            found[f"{name_in_patterns(name, layer)}.{index}"] = matrix
    return found


@pytest.mark.parametrize("kind", FUSED)
def test_every_expert_gets_the_factors_that_the_method_finds(kind: str) -> None:
    method = METHODS["displaced"]
    model = built(FUSED[kind])
    statistics = collected(model, [batch()], needs=method.needs)
    targets = match_targets(model, lora()).layers
    expected = {}
    for name in statistics:
        if "experts" not in name:
            continue
        spec = targets[name].spec
        pair = method.solve(targets[name].module.weight, statistics[name], spec.rank, spec.scaling)
        expected[name] = spec.scaling * pair.B @ pair.A
    found = expert_deltas(some(method, model))
    assert expected.keys() <= found.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-4, atol=1e-7)
        assert bool(delta.any())


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
@pytest.mark.parametrize("form", CHANGES)
def test_start_train_save_reload(
    kind: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = mixtral()
    before, expected = base_weights(base), logits(base)
    with caplog.at_level("INFO", logger="lorainit"):
        wrapped = some(METHODS[kind], base, form)
    assert ("mlp.gate.weight" in caplog.text) == (form == "all-linear")
    assert "24 layers" in caplog.text or "20 layers" in caplog.text
    if kind == "anchored":
        torch.testing.assert_close(logits(wrapped), expected, rtol=1e-6, atol=1e-6)
    else:
        assert not torch.allclose(logits(wrapped), expected, atol=1e-5)
    started = [n for n, p in wrapped.named_parameters() if "experts" in n and "lora_B" in n]
    assert len(started) == 4
    assert all(bool((wrapped.get_parameter(n) != 0).any()) for n in started)
    trainable = wrapped.get_nb_trainable_parameters()[0]
    stock = some(METHODS["default"], mixtral(), form)
    assert stock.get_nb_trainable_parameters()[0] == trainable
    train(wrapped, rate=0.5)
    assert_same_bits(before, base_weights(wrapped))
    live = logits(wrapped)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), expected)

    wrapped.save_pretrained(tmp_path)
    for loaded in (
        PeftModel.from_pretrained(mixtral(), tmp_path),
        lorainit.load_adapter(mixtral(), tmp_path),
    ):
        torch.testing.assert_close(logits(loaded), live, rtol=1e-5, atol=2e-6)
    assert loaded.get_nb_trainable_parameters()[0] == trainable
    assert wrapped.state_dict().keys() == loaded.state_dict().keys()
    wrapped.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(wrapped), live)
    train(wrapped, rate=0.1), train(loaded, rate=0.1)
    torch.testing.assert_close(logits(loaded), logits(wrapped), rtol=1e-5, atol=2e-6)

    some(METHODS["zero-b"], wrapped, adapter_name="default")
    assert wrapped.get_nb_trainable_parameters()[0] == trainable
    live = logits(loaded)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), live, rtol=1e-5, atol=2e-6)


def test_an_anchored_start_in_bfloat16_is_the_base() -> None:
    base = mixtral().to(torch.bfloat16)
    expected = logits(base)
    wrapped = some(METHODS["anchored"], base)
    assert torch.equal(logits(wrapped), expected)
    assert not torch.equal(logits(train(wrapped, rate=5.0)), expected)


def test_in_a_fresh_process_without_lorainit(tmp_path: Path) -> None:
    wrapped = train(some(METHODS["anchored"], mixtral()), rate=0.5)
    wrapped.save_pretrained(tmp_path / "adapter")
    mixtral().save_pretrained(tmp_path / "base")
    found = run_fresh(
        """
        import peft, torch, transformers
        from tests.life import mixtures
        base = transformers.MixtralForCausalLM.from_pretrained(f"{root}/base").eval()
        model = peft.PeftModel.from_pretrained(base, f"{root}/adapter").eval()
        with torch.no_grad():
            out = model(**mixtures.batch()).logits
        result = {"out": out.flatten().tolist(), "ours": "lorainit" in sys.modules}
        """,
        root=str(tmp_path),
    )
    assert not found["ours"]
    with torch.no_grad():
        live = wrapped.eval()(**batch()).logits.flatten()
    torch.testing.assert_close(torch.tensor(found["out"]), live, rtol=1e-5, atol=2e-6)


def test_two_adapters_with_different_methods() -> None:
    wrapped = some(METHODS["displaced"], mixtral())
    alone = logits(wrapped)
    start(
        wrapped,
        METHODS["anchored"],
        lora(),
        adapter_name="second",
        data=[batch()],
        on_unused="default",
    )
    assert torch.equal(logits(wrapped), alone)
    wrapped.set_adapter("second")
    torch.testing.assert_close(logits(wrapped), logits(mixtral()), rtol=1e-6, atol=1e-6)
    train(wrapped, rate=0.5)
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), alone)


@pytest.mark.parametrize("method", [lorainit.Natural(steps=2), lorainit.EVA(rho=2.0)], ids=str)
def test_measured_lengths_and_redistributed_ranks(method: Any) -> None:
    """Natural displaces the experts by hooks; EVA gives other layers' ranks, the experts' stay."""
    data = [batch(rows=8, seed=seed) for seed in range(4)]
    wrapped = some(method, mixtral(), data=data)
    ranks = {
        layer.r["default"]
        for layer in wrapped.modules()
        if type(layer).__name__ == "ParamWrapper" and layer.num_experts > 1
    }
    assert ranks == {2}
    inputs = data[0]
    with torch.no_grad():
        after, before = wrapped(**inputs).loss, mixtral()(**inputs).loss
    if isinstance(method, lorainit.Natural):
        assert float(after) < float(before)
        assert all(delta.any() for delta in expert_deltas(wrapped).values())
    else:
        torch.testing.assert_close(after, before)


def test_ranks_are_capped_for_a_whole_parameter() -> None:
    big = lora(r=20, target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    with untouched(base := mixtral()), pytest.raises(errors.RankError, match=r"_proj' has rank 20"):
        start(base, METHODS["displaced"], big, data=[batch()], on_unused="raise")
    wrapped = start(
        base, METHODS["displaced"], big, data=[batch()], on_unused="default", cap_rank=True
    )
    ranks = {
        layer.parameter_name: layer.r["default"]
        for layer in wrapped.modules()
        if type(layer).__name__ == "ParamWrapper" and layer.num_experts > 1
    }
    assert ranks == {"gate_up_proj": 16, "down_proj": 16}
    assert logits(train(wrapped)).isfinite().all()


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_what_peft_refuses_for_parameters_is_found_before_any_work(changes: dict[str, Any]) -> None:
    base = mixtral()
    calls: list[int] = []
    base.register_forward_hook(lambda *_: calls.append(1))
    with untouched(base), pytest.raises(errors.TargetError, match=next(iter(changes))):
        start(base, METHODS["displaced"], lora(**changes), data=[batch()])
    assert not calls


def test_experts_alone_are_targets_enough() -> None:
    only = LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS)
    wrapped = start(mixtral(), METHODS["displaced"], only, data=[batch()], on_unused="default")
    assert not torch.equal(logits(wrapped), logits(mixtral()))


def test_experts_offloaded_to_the_host() -> None:
    from accelerate import cpu_offload

    expected = some(METHODS["displaced"], mixtral())
    offloaded = cpu_offload(mixtral(), execution_device="cpu")
    assert offloaded.model.layers[0].mlp.experts.down_proj.is_meta
    statistics = collected(offloaded, [batch()], needs=METHODS["displaced"].needs)
    again = some(METHODS["displaced"], mixtral(), data=None, statistics=statistics)
    assert torch.equal(logits(again), logits(expected))


def test_export_is_exact(tmp_path: Path) -> None:
    for kind in ("displaced", "anchored"):
        wrapped = train(some(METHODS[kind], mixtral()), rate=0.5)
        report = lorainit.export(wrapped, tmp_path / kind)
        assert any("target_parameters" in objection for objection in report.objections)
        exported = PeftModel.from_pretrained(mixtral(), tmp_path / kind)
        torch.testing.assert_close(logits(exported), logits(wrapped), rtol=1e-5, atol=2e-6)


# --- experts that are layers ----------------------------------------------------------------------


def seen(model: Any, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of every expert's layers that a token reached."""
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda m, args, out, name=name: found.update({name: args[0].detach()})
        )
        for name, module in model.named_modules()
        if ".expert_" in name and isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(**data)
    for handle in handles:
        handle.remove()
    return found


def test_unfused_experts_are_layers_like_others(tmp_path: Path) -> None:
    model = switch()
    reached = seen(model, pairs())
    everything = {n for n, m in model.named_modules() if ".expert_" in n and n[-2:] in ("wi", "wo")}
    idle = everything - set(reached)
    assert len(reached) > 8
    assert len(idle) > 2
    want = config(r=2, target_modules=["q", "wi", "wo"])
    arguments: dict[str, Any] = {"data": [pairs()], "progress": False}
    with untouched(model), pytest.raises(errors.TargetError, match=min(idle).replace(".", r"\.")):
        lorainit.collect_statistics(model, want, needs=NEEDS, on_unused="raise", **arguments)
    found = lorainit.collect_statistics(model, want, needs=NEEDS, on_unused="default", **arguments)
    assert set(found.metadata["unused"]) == idle

    losses = sequence_to_sequence(model, pairs())
    weights = [model.get_submodule(name).weight for name in reached]
    gradients = torch.autograd.grad(torch.stack(losses).mean(), weights)
    for (name, x), gradient in zip(reached.items(), gradients, strict=True):
        torch.testing.assert_close(found[name].gradient, gradient, rtol=1e-4, atol=1e-8)
        flat = x.reshape(-1, x.shape[-1])
        assert found[name].positions == len(flat)
        torch.testing.assert_close(found[name].input_second_moment, flat.mT @ flat / len(flat))

    wrapped = start(
        model, METHODS["anchored"], want, data=[pairs()], statistics=found, on_unused="default"
    )
    for name in everything:
        moved = wrapped.get_base_model().get_submodule(name).lora_B["default"].trained.any()
        assert bool(moved) == (name in reached), name
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    wrapped(**pairs()).loss.backward()
    optimizer.step()
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        live = wrapped.eval()(**pairs()).logits
        again = PeftModel.from_pretrained(switch(), tmp_path).eval()(**pairs()).logits
    torch.testing.assert_close(again, live, rtol=1e-5, atol=2e-6)
