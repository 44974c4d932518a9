"""Measured starts: cuts in the metric, the loss of held-back sequences, repeated steps, calibrated lengths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import lorainit
from lorainit.adapters.targets import match_targets
from lorainit.calibration import SearchResult
from lorainit.calibration.held_out_loss import HeldOutLoss
from lorainit.calibration.repeated_steps import RepeatedSteps
from lorainit.calibration.take_steps import take_steps
from lorainit.data.sampling import Sample
from lorainit.linalg.low_rank_sum import LowRankSum
from lorainit.methods.metric import KroneckerMetric
from lorainit.models.displacement import LowRank
from lorainit.pipeline.measurements import Measurements
from lorainit.statistics import Statistics
from lorainit.types import LayerStatistics
from tests.adapters.tiny import VOCABULARY, config, llama
from tests.measuring import collected, held_out

ROWS = 24


def sequences(rows: int = ROWS, seed: int = 3) -> list[dict[str, Tensor]]:
    """Counting upwards from a random token: something that a few steps can learn."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(1, VOCABULARY - 1, (rows, 1), generator=generator)
    ids = (first + torch.arange(8) - 1) % (VOCABULARY - 1) + 1
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return [{k: v[i : i + 6] for k, v in full.items()} for i in range(0, rows, 6)]


def moved(model: Any, terms: dict[str, LowRank]) -> Any:
    """The model with the displacement in its weights: what hooks are compared with."""
    copied = copy.deepcopy(model)
    for name, term in terms.items():
        with torch.no_grad():
            copied.get_submodule(name).weight += term.left @ term.right
    return copied


@torch.no_grad()
def loss_of(model: Any, data: list[dict[str, Tensor]]) -> float:
    """Mean over sequences of the mean over their tokens, by the model's own loss one by one."""
    losses = [
        float(model(**{k: v[i : i + 1] for k, v in batch.items()}).loss)
        for batch in data
        for i in range(len(batch["input_ids"]))
    ]
    return sum(losses) / len(losses)


# --- cuts in the metric -----------------------------------------------------------------------


def random_metric(out: int = 9, inner: int = 7, stack: int = 2) -> KroneckerMetric:
    x = torch.randn(stack, 30, inner, dtype=torch.float64) * torch.logspace(0, -3, inner).double()
    y = torch.randn(stack, 30, out, dtype=torch.float64) * torch.logspace(0, -2, out).double()
    return KroneckerMetric(torch.linalg.cholesky(x.mT @ x), torch.linalg.cholesky(y.mT @ y))


@pytest.mark.parametrize("case", ["apart", "unlike lengths", "repeated"])
def test_cut_of_a_sum_is_the_dense_svd_in_the_metric(case: str) -> None:
    metric, rank = random_metric(), 3
    left = torch.randn(2, 9, 5, dtype=torch.float64)
    right = torch.randn(2, 5, 7, dtype=torch.float64)
    if case == "unlike lengths":
        left[..., :2] *= 1e-7
    if case == "repeated":
        left[..., 4], right[..., 4, :] = left[..., 3], right[..., 3, :]
    terms = LowRankSum.in_metric(metric, left, right)
    for weights in (torch.ones(5), torch.tensor([1.0, 1.0, 1.0, 0.1, 0.0])):
        weights = weights.double()
        whole = (left * weights) @ right
        white = metric.y_root.mT @ whole @ metric.x_root
        u, s, vh = torch.linalg.svd(white, full_matrices=False)
        best = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
        cut_left, cut_right = terms.cut(weights, rank)
        assert cut_left.shape == (2, 9, rank)
        assert cut_right.shape == (2, rank, 7)
        found = metric.y_root.mT @ cut_left @ cut_right @ metric.x_root
        assert float((found - best).norm()) < 1e-6 * float(white.norm())
        # Another metric's cut is another one: the test can tell.
        plain = torch.linalg.svd(whole, full_matrices=False)
        other = (plain[0][..., :rank] * plain[1][..., None, :rank]) @ plain[2][..., :rank, :]
        if float(s[..., rank].max()) > 1e-3 * float(s.max()):
            missed = metric.y_root.mT @ other @ metric.x_root
            assert float((missed - best).norm()) > 1e-3 * float(white.norm())


# --- the loss of held-back sequences ------------------------------------------------------------


def displacement(model: Any, size: float = 0.05) -> dict[str, LowRank]:
    targets = match_targets(model, config()).layers
    return {
        name: LowRank(
            size * torch.randn(t.spec.out_features, 2), torch.randn(2, t.spec.in_features)
        )
        for name, t in targets.items()
    }


def loss_at(model: Any, data: list[dict[str, Tensor]], **options: Any) -> HeldOutLoss:
    targets = match_targets(model, config()).layers
    return held_out(model, {n: t.module for n, t in targets.items()}, data, **options)


def test_held_out_loss_is_the_loss_of_the_displaced_model() -> None:
    model, data = llama(), sequences()
    before = copy.deepcopy(model.state_dict())
    one, other = displacement(model), displacement(model, 0.2)
    with loss_at(model, data).measuring() as loss:
        found = [loss(one), loss({}), loss(other), loss(one)]
    wanted = [loss_of(moved(model, terms), data) for terms in (one, {}, other, one)]
    assert found == pytest.approx(wanted, rel=1e-5)
    assert found[0] == found[3] != found[2]
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in before)
    assert loss_of(model, data) == pytest.approx(wanted[1], rel=1e-6)
    assert not any(m._forward_hooks for m in model.modules())


def test_held_out_loss_draws_the_same_numbers_at_every_trial() -> None:
    model, data = llama(), sequences(6)

    def noisy(model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(**batch).logits
        return (logits * torch.rand_like(logits)).mean((1, 2))

    state = torch.get_rng_state()
    with loss_at(model, data, loss_fn=noisy).measuring() as loss:
        assert loss({}) == loss({})
    assert torch.equal(torch.get_rng_state(), state)


def test_held_out_loss_closes_after_an_error() -> None:
    model, data = llama(), sequences(6)
    model.train()
    wrong = {next(iter(displacement(model))): LowRank(torch.zeros(3, 2), torch.zeros(2, 5))}
    with loss_at(model, data).measuring() as loss, pytest.raises(RuntimeError):
        loss(wrong)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


# --- natural steps ------------------------------------------------------------------------------


def run(steps: int) -> tuple[Any, list[tuple[dict[str, LowRank], SearchResult]], list[Any], Any]:
    model, data = llama(), sequences()
    fit, held = data[:3], data[3:]
    targets = match_targets(model, config(r=4)).layers
    modules = {n: t.module for n, t in targets.items()}
    needs = lorainit.Natural().needs
    at: list[dict[str, LowRank]] = []

    def collect_at(step: int, terms: Any) -> Statistics:
        at.append(dict(terms))
        displaced_model = moved(model, dict(terms))
        inside = {n: displaced_model.get_submodule(n) for n in modules}
        return collected(displaced_model, inside, fit, needs)

    seen: list[tuple[dict[str, LowRank], SearchResult]] = []
    take_steps(
        # A small random model has far to go.
        lorainit.Natural(steps=steps, trust_region=10.0),
        targets,
        lambda step: held_out(model, modules, held),
        collect_at,
        progress=False,
        on_step=lambda number, terms, result: seen.append((terms, result)),
    )
    return model, seen, held, at


def test_every_step_is_measured_and_none_goes_up() -> None:
    model, seen, held, at = run(4)
    losses = [seen[0][1].start_loss, *(result.loss for _, result in seen)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[1] < losses[0] - 0.05
    for terms, result in seen:
        assert loss_of(moved(model, terms), held) == pytest.approx(result.loss, rel=1e-4)
        assert all(term.left.shape[1] <= 4 for term in terms.values())
    # Each step's statistics are taken where the one before ended.
    assert at[0] == {}
    for before, now in zip(seen, at[1:], strict=False):
        for name, term in now.items():
            assert torch.equal(term.left, before[0][name].left)


def test_first_steps_of_more_steps_are_the_same() -> None:
    one, three = run(1)[1], run(3)[1]
    assert one[0][1].loss == three[0][1].loss
    for name, term in one[0][0].items():
        assert torch.equal(term.left @ term.right, three[0][0][name].left @ three[0][0][name].right)


def test_every_step_is_measured_on_other_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the public door: what a step is measured on was not in its statistics; all is used."""
    held: list[set[int]] = []
    fitted: list[set[int]] = []
    measure, collect = Measurements.held_out_loss, Measurements.statistics
    data = sequences()
    for i, batch in enumerate(data):
        batch["input_ids"][:, 0] = 6 * i + torch.arange(6) + 1  # told apart by their first token

    def rows(sample: Sample) -> set[int]:
        found = (row for batch in sample.batches for row in batch.content["input_ids"])
        return {int(row[0]) - 1 for row in found}

    def seen_loss(self: Measurements, sample: Sample) -> HeldOutLoss:
        held.append(rows(sample))
        return measure(self, sample)

    def seen_statistics(
        self: Measurements, sample: Sample, at: Any = None, planned: Any = None
    ) -> Statistics:
        fitted.append(rows(sample))
        return collect(self, sample, at, planned)

    monkeypatch.setattr(Measurements, "held_out_loss", seen_loss)
    monkeypatch.setattr(Measurements, "statistics", seen_statistics)
    lorainit.get_peft_model(
        llama(), config(r=4), method=lorainit.Natural(steps=3), data=data, progress=False
    )
    steps = len(fitted)
    assert steps == 3
    for fit, back in zip(fitted, held, strict=False):
        assert fit.isdisjoint(back)
        assert fit | back == set(range(ROWS))
    assert len(set.union(*held[:steps])) == sum(map(len, held[:steps]))


def test_a_displacement_that_other_sequences_refuse_is_given_up() -> None:
    """Each step goes down where it is measured, but the last sequences are better off at the base."""
    model, data = llama(), sequences()
    targets = match_targets(model, config(r=4)).layers
    modules = {n: t.module for n, t in targets.items()}
    needs = lorainit.Natural().needs

    def loss_of_step(step: int) -> HeldOutLoss:
        sign = 1.0 if step == 1 else -1.0
        return held_out(model, modules, data, loss_fn=lambda m, b: sign * _own(m, b))

    def collect_at(step: int, at: Any) -> Statistics:
        # No slope at the second step: it stays where the first one led.
        return collected(
            model, modules, data, needs, loss_fn=lambda m, b: (2.0 - step) * _own(m, b)
        )

    seen: list[SearchResult] = []
    factors, found = take_steps(
        lorainit.Natural(steps=2),
        targets,
        loss_of_step,
        collect_at,
        progress=False,
        on_step=lambda number, terms, result: seen.append(result),
    )
    assert seen[0].length > 0
    assert found.length == 0
    assert found.loss == found.start_loss
    assert all(float(pair.B.abs().max()) == 0 for pair in factors.values())
    assert all(float(pair.A.norm()) > 0 for pair in factors.values())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("region", [1e-3, 0.02, 1e9])
def test_no_layer_leaves_its_trust_region(region: float, steps: int) -> None:
    method = lorainit.Natural(steps=steps, trust_region=region)
    wrapped = lorainit.get_peft_model(
        llama(), config(r=4), method=method, data=sequences(), progress=False
    )
    check_region(wrapped, region)


@pytest.mark.parametrize("name", ["LoraDA", "LoraOne"])
@pytest.mark.parametrize("region", [1e-3, 0.02, 1e9])
def test_no_calibrated_layer_leaves_it(
    name: str, region: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = getattr(lorainit, name)(scale="calibrated")
    monkeypatch.setattr(type(method), "trust_region", region)
    wrapped = lorainit.get_peft_model(
        llama(), config(r=4), method=method, data=sequences(), progress=False
    )
    check_region(wrapped, region)


def check_region(wrapped: Any, region: float) -> None:
    """A narrow region is filled by some layer and left by none, a wide one is not felt."""
    sizes = []
    for layer in wrapped.modules():
        if hasattr(layer, "lora_A"):
            moved = layer.get_delta_weight("default").detach()
            sizes.append(float(moved.norm() / layer.get_base_layer().weight.norm()))
    assert 0 < max(sizes) <= region * (1 + 1e-4)
    assert (max(sizes) > 0.99 * region) == (region < 1)


def test_rows_of_a_start_answer_the_data_alike() -> None:
    """Activations of ``A``, on the data themselves, are the stated share of a default LoRA's.

    The share is large enough for no row to need more, so that a step of ``A`` moves less than one of ``B``.
    """
    model, data = llama(), sequences()
    method = lorainit.Natural(activation=20, damping=1e-6)
    statistics = lorainit.collect_statistics(
        model, config(r=4), data=data, needs=method.needs, progress=False
    )
    wrapped = lorainit.get_peft_model(
        model, config(r=4), method=method, statistics=statistics, data=data, progress=False
    )
    seen: dict[str, list[Tensor]] = {}
    layers = {n: m for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda m, args, name=name: seen.setdefault(name, []).append(args[0].detach())
        )
    with torch.no_grad(), wrapped.disable_adapter():
        for batch in data:
            wrapped(**batch)
    norms = []
    for name, inputs in seen.items():
        x = torch.cat([i.flatten(0, -2) for i in inputs])
        a = layers[name].lora_A["default"].weight.detach()
        ours = (x @ a.T).square().mean(0).sqrt()
        default = (x.square().sum(-1).mean() / (3 * x.shape[-1])).sqrt()
        assert torch.allclose(ours, 20 * default.expand(len(a)), rtol=0.02), name
        norms += a.norm(dim=1).tolist()
    # The rows themselves are of different lengths.
    assert max(norms) > 1.5 * min(norms)


def test_spare_rows_are_random() -> None:
    """Rows without a column are a default LoRA's, longer; the others are those of the gradient."""
    data = sequences()
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        wrapped = lorainit.get_peft_model(
            llama(), config(r=8), method=lorainit.Natural(), data=data, progress=False
        )
        layer = next(m for m in wrapped.modules() if hasattr(m, "lora_A"))
        a, b = (getattr(layer, n)["default"].weight.detach() for n in ("lora_A", "lora_B"))
        drawn.append((a, (b == 0).all(0)))
    (first, unused), (second, same) = drawn
    assert torch.equal(unused, same)
    assert 0 < int(unused.sum()) < 8
    assert torch.equal(first[~unused], second[~unused])
    assert not torch.isclose(first[unused], second[unused]).any(1).all()
    bound = 2 / first.shape[1] ** 0.5
    assert 0.8 * bound < float(first[unused].abs().max()) <= bound


def test_rows_that_a_cut_leaves_unused_are_spare_too() -> None:
    """After a second step along the first one's directions the others' columns are rounding, not zero."""
    torch.manual_seed(0)
    x, g = torch.randn(300, 12, dtype=torch.float64), torch.randn(300, 10, dtype=torch.float64)
    statistics = LayerStatistics(
        gradient_sum=g.mT @ x, input_second_moment_sum=x.mT @ x,
        output_second_moment_sum=g.mT @ g, sequences=300, label_tokens=300, positions=300,
    )  # fmt: skip
    method = lorainit.Natural()
    step = method.step(statistics, 6)
    left, right, metric = step.left, step.right, step.metric
    used = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    both = torch.cat([left * used, left], -1), torch.cat([right, right], -2)
    weights = torch.cat([torch.ones_like(used), used])
    again = LowRankSum.in_metric(metric, *both).cut(weights, 6)
    a, b = method.factors(*again, 2.0, statistics, seeds=[0])
    kept = method.factors(*again, 2.0, statistics)[0]
    assert (b == 0).all(0).tolist() == [False, False, True, True, True, True]
    torch.testing.assert_close(a[:2], kept[:2])
    assert not torch.isclose(a[2:], kept[2:]).any(1).all()
    assert float(a[2:].abs().max()) <= 2 / 12**0.5
    torch.testing.assert_close(2.0 * b @ a, 2 * (left[:, :2] @ right[:2]))


def test_inputs_that_are_all_zero_make_no_nan() -> None:
    zero = torch.zeros(12, 12, dtype=torch.float64)
    statistics = LayerStatistics(
        gradient_sum=zero, input_second_moment_sum=zero, output_second_moment_sum=zero + torch.eye(12),
        sequences=3, label_tokens=3, positions=3,
    )  # fmt: skip
    method = lorainit.Natural(damping=1e-3, damping_mode="absolute", length=1.0)
    found = method.solve(torch.zeros(12, 12), statistics, 4, 2.0)
    assert not found.B.any()
    assert found.A.isfinite().all()


def test_more_steps_by_the_public_door() -> None:
    """The statistics at the displaced point come through hooks here; losses by the installed adapter."""
    data = sequences()
    losses = {}
    for steps in (1, 3):
        wrapped = lorainit.get_peft_model(
            llama(), config(r=4), method=lorainit.Natural(steps=steps), data=data, progress=False
        )
        losses[steps] = loss_of(wrapped, data)
    base = loss_of(llama(), data)
    assert losses[3] < losses[1] < base


def test_no_way_down_starts_where_the_model_is() -> None:
    """A loss that is least at the base: no displacement, and rows to train."""
    model, data = llama(), sequences()
    targets = match_targets(model, config(r=4)).layers
    modules = {n: t.module for n, t in targets.items()}
    with torch.no_grad():
        base = model(**data[0]).logits

    def away(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return (model(**batch).logits - base).square().mean((1, 2))

    needs = lorainit.Natural().needs
    steps = RepeatedSteps(lorainit.Natural(), targets)
    found = collected(model, modules, data, needs)
    result = steps.take(found, held_out(model, modules, data[:1], loss_fn=away))
    assert any(loss > 0 for _, loss in result.trials)
    assert (result.length, result.loss, result.start_loss) == (0, 0, 0)
    for pair in steps.factors().values():
        assert not (pair.B @ pair.A).any()
        assert float(pair.A.norm()) > 0


def _own(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    token = torch.nn.functional.cross_entropy(
        logits[:, :-1].mT, batch["labels"][:, 1:], reduction="none"
    )
    return token.mean(1)


@pytest.mark.parametrize("name", ["LoraDA", "LoraOne"])
def test_calibrated_length_is_the_best_of_its_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sequences()
    method = getattr(lorainit, name)(scale="calibrated")
    # The random model would move out of the region.
    monkeypatch.setattr(type(method), "trust_region", 1e9)
    wrapped = lorainit.get_peft_model(
        llama(), config(r=4), method=method, data=data, progress=False
    )
    base = loss_of(llama(), data)
    found = loss_of(wrapped, data)
    assert found < base
    ups = [p for n, p in wrapped.named_parameters() if "lora_B" in n]
    for factor in (0.25, 3.0):
        with torch.no_grad():
            for p in ups:
                p.mul_(factor)
            assert loss_of(wrapped, data) > found - 0.02 * (base - found)
            for p in ups:
                p.div_(factor)


# --- layers that share an input ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora-da", "natural", "filet", "eva", "corda"])
def test_shared_inputs_give_what_apart_ones_give(name: str) -> None:
    from lorainit.methods import METHODS

    method = METHODS[name]()
    model = llama()
    targets = match_targets(model, config()).layers
    modules = {n: t.module for n, t in targets.items()}
    found = collected(model, modules, sequences(), method.needs | {"input_second_moment"})
    pairs = [n for n in targets if n.endswith(("k_proj", "v_proj"))]
    assert found[pairs[0]].input_second_moment_sum is found[pairs[1]].input_second_moment_sum
    layers = [found[n].only(method.needs) for n in pairs]
    weights = torch.stack([targets[n].module.weight.detach() for n in pairs])
    apart = method.solve(weights, LayerStatistics.stack(layers), 3, 2.0)
    shared = LayerStatistics.stack(layers, sharing=2)
    if shared.input_second_moment_sum is not None:
        assert shared.input_second_moment_sum.stride(1) == 0
    together = method.solve(weights.reshape(2, 2, *weights.shape[1:]), shared, 3, 2.0)
    for half in ("A", "B"):
        assert torch.allclose(
            getattr(together, half).flatten(0, 1), getattr(apart, half), atol=1e-6
        )
