import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import lorainit
from lorainit.solve import stacks


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    return LlamaForCausalLM(config).eval()


def batches():
    ids = torch.randint(0, 20, (16, 9), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids[i : i + 8], "labels": ids[i : i + 8]} for i in (0, 8)]


def configuration(**other):
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **other)


def layer_ranks(model):
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and m.r}
    return {n: m.r["default"] for n, m in layers.items()}, {
        m.scaling["default"] for m in layers.values()
    }


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "method", [lorainit.EVA(rho=2.0), lorainit.Natural(rho=2.0)], ids=["eva", "natural"]
)
def test_ranks_move_within_the_budget_at_one_scaling(method, rslora, tmp_path):
    config = configuration(use_rslora=rslora)
    model = lorainit.get_peft_model(tiny(), config, method=method, data=batches(), progress=False)
    ranks, scalings = layer_ranks(model)
    assert sum(ranks.values()) == 4 * len(ranks)
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    want = 8 / 4**0.5 if rslora else 8 / 4
    assert all(s == pytest.approx(want) for s in scalings)
    ids = batches()[0]["input_ids"]
    live = model(ids).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path)(ids).logits
    torch.testing.assert_close(again, live, rtol=0, atol=1e-6)
    assert config.rank_pattern == {}


def test_solves_are_told_the_memory_that_is_allowed(monkeypatch):
    """How large stacks are follows from it, also where all layers' statistics come before the first solve."""
    allowed = []

    def spy(targets, method, max_memory=None, *, exact=False):
        allowed.append(max_memory)
        return 1 << 20

    monkeypatch.setattr(stacks, "stack_bytes", spy)
    lorainit.get_peft_model(
        tiny(),
        configuration(),
        method=lorainit.EVA(rho=2.0),
        data=batches(),
        max_memory="1GiB",
        progress=False,
    )
    assert allowed == [2**30, 2**30]


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_solves_in_float64_are_told_apart(precision, monkeypatch):
    """They take twice the memory of those in float32."""
    exact = []

    def spy(targets, method, max_memory=None, *, exact=False, told=exact):
        told.append(exact)
        return 1 << 20

    monkeypatch.setattr(stacks, "stack_bytes", spy)
    lorainit.get_peft_model(
        tiny(),
        configuration(),
        method=lorainit.LoraDA(),
        data=batches(),
        precision=precision,
        progress=False,
    )
    assert exact == [precision == "exact"]


def test_rho_of_one_keeps_every_rank():
    """The control: nothing moves where it was not asked for."""
    model = lorainit.get_peft_model(
        tiny(), configuration(), method=lorainit.EVA(rho=1.0), data=batches(), progress=False
    )
    assert set(layer_ranks(model)[0].values()) == {4}


def test_layers_get_what_their_directions_are_worth():
    """EVA's ranks are the counts of the largest explained variances of all layers."""
    method = lorainit.EVA(rho=2.0)
    statistics = lorainit.collect_statistics(
        tiny(), configuration(), data=batches(), needs=method.needs, progress=False
    )
    model = lorainit.get_peft_model(
        tiny(), configuration(), method=method, statistics=statistics, progress=False
    )
    ranks = {n.removeprefix("base_model.model."): r for n, r in layer_ranks(model)[0].items()}
    values = {}
    for name, layer in statistics.items():
        mean = layer.input_mean.double()
        spectrum = torch.linalg.eigvalsh(
            layer.input_second_moment.double() - torch.outer(mean, mean)
        ).flip(0)
        values[name] = spectrum[:8] / spectrum.sum()
    inside = min(float(values[n][r - 1]) for n, r in ranks.items() if r > 1)
    outside = max(float(values[n][r]) for n, r in ranks.items() if r < len(values[n]))
    assert inside >= outside * (1 - 1e-4)


def inputs_and_errors(model, data):
    """Per layer: mean gradient by autograd, and both second moments, sequence by sequence."""
    found = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    layers.pop("lm_head")
    kept = {}
    handles = [
        m.register_forward_hook(lambda m, x, y, n=n: kept.__setitem__(n, (x[0].detach(), y)))
        for n, m in layers.items()
    ]
    rows = torch.cat([batch["input_ids"] for batch in data])
    for row in rows:
        ids = row[None]
        loss = model(input_ids=ids, labels=ids).loss
        outputs = [y for _, y in kept.values()]
        weights = [m.weight for m in layers.values()]
        grads = torch.autograd.grad(loss, outputs + weights)
        for i, (n, (x, _)) in enumerate(kept.items()):
            g, w = grads[i][0].double(), grads[len(outputs) + i].double()
            sums = found.setdefault(n, [0.0, 0.0, 0.0])
            for k, term in enumerate((w, x[0].double().mT @ x[0].double(), g.mT @ g)):
                sums[k] = sums[k] + term
    for handle in handles:
        handle.remove()
    counts = len(rows), rows.numel(), rows.numel()
    weights = {n: m.weight.detach().double() for n, m in layers.items()}
    return {n: [s / c for s, c in zip(v, counts, strict=True)] for n, v in found.items()}, weights


def started(method, *, anchored=False):
    model = lorainit.get_peft_model(
        tiny(), configuration(), method=method, data=batches(), progress=False
    )
    ranks, scalings = layer_ranks(model)
    assert all(s == pytest.approx(2.0) for s in scalings)
    # An anchored layer shows its frozen start's rank, too.
    share = 2 if anchored else 1
    return {n.removeprefix("base_model.model."): r // share for n, r in ranks.items()}


def test_gora_ranks_follow_weight_and_gradient():
    """Equations 5 to 8 from autograd's gradients; the weight counts: without it ranks are others."""
    found, weights = inputs_and_errors(tiny(), batches())

    def wanted(worth):
        total = sum(worth.values())
        cost = {n: sum(w.shape) ** 0.5 for n, w in weights.items()}
        budget = 4 * sum(cost.values())
        raw = {n: round(worth[n] / total * budget / cost[n]) for n in worth}
        return {n: max(2, min(16, r)) for n, r in raw.items()}

    ranks = started(lorainit.GoRA())
    assert ranks == wanted(
        {n: float((weights[n] * g).abs().mean()) for n, (g, _, _) in found.items()}
    )
    assert ranks != wanted({n: float(g.abs().mean()) for n, (g, _, _) in found.items()})
    assert set(started(lorainit.GoRA(rho=1.0)).values()) == {4}


def test_farss_ranks_are_small_where_the_first_blocks_matter():
    found, weights = inputs_and_errors(tiny(), batches())
    worth = {
        n: float(torch.trace(sy @ weights[n] @ sx @ weights[n].mT)) / weights[n].numel()
        for n, (_, sx, sy) in found.items()
    }
    early = [n for n in worth if ".layers.0." in n]
    unit = sum(1 / worth[n] for n in early) / len(early)
    wanted = {n: 4 for n in worth}
    wanted |= {n: max(1, min(2, round(4 * 50 / 128 / worth[n] / unit))) for n in early}
    ranks = started(lorainit.FARSS(early_blocks=1), anchored=True)
    assert ranks == wanted
    assert set(started(lorainit.FARSS(), anchored=True).values()) == {4}


def test_a_layers_own_importance_decides_its_rank():
    """Of two early layers the less important gets more; layers that are no block's keep theirs."""
    spec = {
        n: lorainit.types.LayerSpec(n, 64, 64, 128, 1.0) for n in ("h.0.a", "h.0.b", "h.1.a", "c")
    }
    ranks = lorainit.FARSS(early_blocks=1).ranks(
        {"h.0.a": 3.0, "h.0.b": 1.0, "h.1.a": 9.0, "c": 9.0}, spec
    )
    assert ranks == {"h.0.a": 25, "h.0.b": 64, "h.1.a": 128, "c": 128}
