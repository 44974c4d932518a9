"""The stacked trainer against PEFT, autograd and torch's AdamW, one run at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks.common.tasks import IGNORED, Example
from benchmarks.quality.data.order import batch_order
from benchmarks.quality.data.pools import pools_from_examples
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.initialization import Initialiser, lora_config, start_of
from benchmarks.quality.training.llama import StackedLlama
from benchmarks.quality.training.reference import score_plain, train_plain
from benchmarks.quality.training.trainer import Job, StackTrainer
from benchmarks.quantized.quantizers import quantize
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import lorainit

END, PAD, VOCABULARY = 1, 0, 24


def examples(count: int, seed: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        prompt = torch.randint(2, VOCABULARY, (3 + i % 4,), generator=generator).tolist()
        answer = [prompt[0]] * (1 + prompt[0] % 3) + [END]
        found.append(Example((*prompt, *answer), (*([IGNORED] * len(prompt)), *answer)))
    return found


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def pools():
    splits = {"train": examples(64, 1), "validation": examples(40, 2)}
    return pools_from_examples(splits, PAD)


CONFIG = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear")
RUNS = [
    (lorainit.Vanilla(), 1e-2, 0),
    (lorainit.Orthogonal(), 3e-3, 1),
    (lorainit.PiSSA(), 1e-3, 2),
]


def wrapped(method, seed):
    torch.manual_seed(seed)
    return lorainit.get_peft_model(base_model(), CONFIG, method=method, progress=False)


@pytest.mark.parametrize("anchored", [False, True])
def test_a_stack_trains_as_separate_runs_do(pools, anchored):
    runs = [run for run in RUNS if anchored or not isinstance(run[0], lorainit.PiSSA)]
    steps, batch = 12, 8
    base = StackedLlama(base_model(), torch.float32, fuse=False)
    trainer = StackTrainer(
        base,
        stack=4,
        rank=4,
        anchored=anchored,
        scaling=6 / 4**0.5,
        train=pools["train"],
        batch_size=batch,
        max_steps=16,
        warmup=0.1,
        clip=0.5,
        evaluation_rows=16,
        graphs=False,
    )
    assert_trains_as_separate_runs(trainer, runs, wrapped, pools, steps, batch)


def assert_trains_as_separate_runs(trainer, runs, wrap, pools, steps, batch, job_start=start_of):
    """Losses, scores and curves of a stack, beside those of stock PEFT's runs one by one."""
    jobs, expected = [], []
    for method, rate, seed in runs:
        order = batch_order(64, 48, seed, steps, batch)
        model = wrap(method, seed)
        jobs.append(Job(job_start(model), rate, order))
        before = score_plain(model, pools["validation"])
        losses = train_plain(model, pools["train"], order, learning_rate=rate, warmup=0.1, clip=0.5)
        expected.append((before, losses, score_plain(model, pools["validation"])))
    outcomes = trainer.run(
        jobs,
        curve=pools["validation"],
        curve_at=[0, steps],
        scores={"validation": pools["validation"]},
        start_scores={"validation": pools["validation"]},
    )
    assert len(outcomes) == len(runs)
    for outcome, (before, losses, after) in zip(outcomes, expected, strict=True):
        torch.testing.assert_close(outcome.train_loss, losses, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(outcome.start_scores["validation"][0], before[0])
        torch.testing.assert_close(outcome.scores["validation"][0], after[0], rtol=1e-3, atol=1e-3)
        assert (outcome.scores["validation"][1].bool() == after[1]).float().mean() > 0.97
        assert outcome.curve[0] == pytest.approx(float(before[0].mean()), rel=1e-5)
        assert outcome.finite
        assert float((after[0] - before[0]).abs().max()) > 0.01


def test_a_frozen_half_stays(pools):
    base = StackedLlama(base_model(), torch.float32, fuse=False)
    trainer = StackTrainer(
        base, stack=1, rank=4, anchored=True, scaling=1.0, train=pools["train"], batch_size=4,
        max_steps=3, warmup=0.0, clip=1.0, evaluation_rows=8, graphs=False,
    )  # fmt: skip
    start = start_of(wrapped(lorainit.PiSSA(), 0))
    trainer.run([Job(start, 1e-2, batch_order(64, 64, 0, 3, 4))])
    live = trainer.adapters.live.bool()
    fresh = trainer.adapters.weights.clone()
    trainer.adapters.load(0, start)
    moved = fresh != trainer.adapters.weights
    assert not moved[:, ~live].any()
    assert moved[:, live].float().mean() > 0.99


@pytest.mark.parametrize("method", [lorainit.Orthogonal(), lorainit.PiSSA()])
def test_bfloat16_training_stays_near_float32(pools, method):
    """Twenty steps: what rounding costs is small beside what training brings."""
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = StackedLlama(base_model(), dtype, fuse=False)
        start = start_of(wrapped(method, 0))
        trainer = StackTrainer(
            base, stack=1, rank=4, anchored=start.anchored, scaling=3.0, train=pools["train"],
            batch_size=8, max_steps=20, warmup=0.1, clip=1.0, evaluation_rows=40, graphs=False,
        )  # fmt: skip
        outcome = trainer.run(
            [Job(start, 1e-2, batch_order(64, 64, 0, 20, 8))],
            curve=pools["validation"],
            curve_at=[0, 20],
        )[0]
        ends[dtype] = outcome.curve
    wide, narrow = ends[torch.float32], ends[torch.bfloat16]
    assert narrow[0] == pytest.approx(wide[0], rel=5e-3)
    assert abs(narrow[20] - wide[20]) < 0.05 * (wide[0] - wide[20])


def test_an_experiment_with_a_reference_starts_as_the_package_does(pools, monkeypatch) -> None:
    """On a base of few bits; without the setting nothing is given back, without a reference it is an error."""
    full, base = base_model(), base_model()
    config = LoraConfig(target_modules="all-linear")
    monkeypatch.setattr(
        "benchmarks.quantized.quantizers.QUANTIZERS", {"signs": lambda w: w.sign() * 0.02}
    )
    quantize(base, "signs", config)
    assert not torch.equal(
        base.model.layers[0].mlp.up_proj.weight, full.model.layers[0].mlp.up_proj.weight
    )
    assert torch.equal(base.lm_head.weight, full.lm_head.weight)
    wanted = Experiment(
        "chain_sum",
        "loftq",
        1e-3,
        settings={"reference": True},
        model="smollm2-135m-instruct+signs",
        rank=3,
    )
    found = Initialiser(base, reference=full)(wanted, pools["train"]).start
    layer = "model.layers.1.mlp.down_proj"
    a, b = found.factors[layer]
    error = full.get_submodule(layer).weight - base.get_submodule(layer).weight
    u, s, v = torch.linalg.svd(error.detach().double())
    best = (u[:, :3] * s[:3]) @ v[:3]
    assert float((wanted.scaling * (b @ a).double() - best).norm() / best.norm()) < 1e-4
    with pytest.raises(ValueError, match="has no reference"):
        Initialiser(base)(wanted, pools["train"])


@pytest.mark.parametrize("method", [lorainit.Vanilla(), lorainit.PiSSA()])
def test_resized_adapters_of_one_stack_train_as_peft_trains_them(pools, method):
    """Each with its own scaling, which PEFT reads off its configuration."""
    runs = [(method, 1e-2, 0), (method, 2e-3, 1), (method, 5e-4, 2)]

    def wrap(method, seed):
        model = wrapped(method, seed)
        lorainit.match_learning_rate(model, 1e-2, runs[seed][1])
        return model

    def job_start(model):
        ratio = (
            model.peft_config["default"].lora_alpha
            / wrapped(method, 0).peft_config["default"].lora_alpha
        )
        return replace(start_of(model), ratio=ratio)

    trainer = StackTrainer(
        StackedLlama(base_model(), torch.float32, fuse=False), stack=4, rank=4,
        anchored=isinstance(method, lorainit.PiSSA), scaling=6 / 4**0.5, resized=True, train=pools["train"],
        batch_size=8, max_steps=16, warmup=0.1, clip=0.5, evaluation_rows=16, graphs=False,
    )  # fmt: skip
    assert_trains_as_separate_runs(trainer, runs, wrap, pools, 12, 8, job_start)


def test_a_matched_experiment_starts_as_the_package_does(pools) -> None:
    base, same = base_model(), base_model()
    line = Experiment(
        "gcd", "vanilla", 1e-3, rank=4, alpha=6, settings={"matched": True},
        train_samples=48, statistics_samples=48,
    )  # fmt: skip
    initialise = Initialiser(base, batch_size=16)
    found = initialise(line, pools["train"])
    batches = initialise.batches(line, pools["train"])
    torch.manual_seed(line.seed)
    theirs = lorainit.get_peft_model(
        same, lora_config(line), method=lorainit.Vanilla(), data=batches, max_sequences=None,
        learning_rate=1e-3, progress=False,
    )  # fmt: skip
    assert found.start.ratio == pytest.approx(
        theirs.peft_config["default"].lora_alpha / 6, rel=1e-6
    )
    for name, (a, b) in start_of(theirs).factors.items():
        for mine, theirs_ in zip(found.start.factors[name], (a, b), strict=True):
            torch.testing.assert_close(mine, theirs_, rtol=1e-5, atol=1e-7)
    # Another rate is another start of the same line, found without new measurements.
    other = initialise(line.at(learning_rate=2e-4), pools["train"])
    assert other.start.ratio >= 16 * found.start.ratio
    assert other.suggested == found.suggested
