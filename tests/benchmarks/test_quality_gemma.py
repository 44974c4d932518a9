"""The stacked Gemma against PEFT, autograd and torch's AdamW, one run at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from benchmarks.quality.data.order import batch_order
from benchmarks.quality.data.pools import pools_from_examples
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.initialization import Initialiser, start_of
from benchmarks.quality.training import gemma
from benchmarks.quality.training.adapters import Adapters
from benchmarks.quality.training.reference import score_plain
from benchmarks.quality.training.trainer import Job, StackTrainer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import lorainit
from tests.benchmarks.test_quality_trainer import (
    CONFIG,
    END,
    PAD,
    RUNS,
    VOCABULARY,
    assert_trains_as_separate_runs,
    examples,
)

WINDOW = 4


def config(**changes) -> Gemma3TextConfig:
    """Three layers, the middle one with all of the past; a window that the sequences are longer than."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
        "query_pre_attn_scalar": 7, "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": END,
    }  # fmt: skip
    return Gemma3TextConfig(**(sizes | changes))


def base_model(**changes) -> Gemma3ForCausalLM:
    """Random weights, also in the norms, which transformers would start at zero."""
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 0.15)
    return model


@pytest.fixture(scope="module")
def pools():
    splits = {"train": examples(64, 1), "validation": examples(40, 2)}
    return pools_from_examples(splits, PAD)


def wrapped(method, seed, **changes):
    torch.manual_seed(seed)
    return lorainit.get_peft_model(base_model(**changes), CONFIG, method=method, progress=False)


def trainer_of(base, pools, **changes):
    settings = {
        "stack": 4, "rank": 4, "anchored": False, "scaling": 6 / 4**0.5, "train": pools["train"],
        "batch_size": 8, "max_steps": 16, "warmup": 0.1, "clip": 0.5, "evaluation_rows": 16,
        "graphs": False,
    }  # fmt: skip
    return StackTrainer(base, **(settings | changes))


def stacked(dtype=torch.float32, **changes):
    return gemma.StackedGemma(base_model(**changes), dtype, fuse=False)


@pytest.mark.parametrize("anchored", [False, True])
def test_a_stack_trains_as_separate_runs_do(pools, anchored, monkeypatch):
    monkeypatch.setattr(gemma, "PIECE", 7 * VOCABULARY)
    runs = [run for run in RUNS if anchored or not isinstance(run[0], lorainit.PiSSA)]
    steps, batch = 12, 8
    assert pools["train"].length > WINDOW
    trainer = trainer_of(stacked(), pools, anchored=anchored)
    assert_trains_as_separate_runs(trainer, runs, wrapped, pools, steps, batch)


def test_the_gradients_of_a_stack_are_those_of_separate_runs(pools):
    trainer = trainer_of(stacked(), pools, stack=2, max_steps=1, warmup=0.0)
    jobs, models = [], []
    for seed in (0, 1):
        models.append(wrapped(lorainit.Orthogonal(), seed))
        jobs.append(Job(start_of(models[-1]), 1e-3, batch_order(64, 48, seed, 1, 8)))
    trainer.run(jobs)
    for index, (model, job) in enumerate(zip(models, jobs, strict=True)):
        (batch,) = pools["train"].batches(job.order[0].tolist(), 8)
        model(**batch, use_cache=False).loss.backward()
        seen = 0
        for group in trainer.adapters.groups:
            for place, name in enumerate(group.names):
                layer = model.get_base_model().get_submodule(name)
                down = group.grad_A[index, 4 * place : 4 * place + 4]
                up = group.grad_B[place][index].mT
                for ours, theirs in ((down, layer.lora_A), (up, layer.lora_B)):
                    wanted = theirs["default"].weight.grad
                    assert float((ours - wanted).norm()) < 1e-4 * float(wanted.norm())
                seen += 1
        assert seen == 3 * 7


def losses_of(base, model, pools):
    """Of the first validation sequences, by the stack and by PEFT."""
    adapters = Adapters(base, 1, 4, anchored=False, scaling=6 / 4**0.5)
    adapters.load(0, start_of(model))
    few = pools["validation"].first(16)
    with torch.no_grad():
        losses, _ = base.token_losses(
            few.tokens[None], few.positions[None], few.targets[None], adapters,
            base.rotation(few.length),
        )  # fmt: skip
    ours = (losses[0] * few.weights).sum(1) / few.weights.sum(1)
    return ours, score_plain(model, few)[0]


CHANGES = {
    "nothing": lambda base: None,
    "the window": lambda base: setattr(base, "window", 10**6),
    "the rotary bases": lambda base: setattr(base, "kinds", [1 - k for k in base.kinds]),
    "the scale of attention": lambda base: setattr(base, "attention_scale", 16**-0.5),
    "the scale of embeddings": lambda base: setattr(base, "embedding_scale", 1.0),
    "one more than the weight": lambda base: setattr(base, "final_norm", base.final_norm - 1),
    "norms of heads": lambda base: base.layers[1].update(heads=torch.ones(2, 16)),
    "the norm after attention": lambda base: base.layers[1].update(after_attention=torch.ones(32)),
    "the norm after the MLP": lambda base: base.layers[2].update(after_mlp=torch.ones(32)),
    "the gate": lambda base: setattr(base, "gated", gemma.llama._gated),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_each_part_of_gemma_shows_in_the_losses(pools, change):
    """As it is the stack is right; with any one part left out it is not, so all of them are checked."""
    base = stacked()
    CHANGES[change](base)
    ours, theirs = losses_of(base, wrapped(lorainit.Orthogonal(), 0), pools)
    if change == "nothing":
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    else:
        assert float((ours - theirs).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 2},
        {"sliding_window": 512},
        {"rms_norm_eps": 0.3},
    ],
    ids=str,
)
def test_other_configurations(pools, changes):
    base = stacked(**changes)
    assert (base.head is base.embedding) == ("tie_word_embeddings" not in changes)
    ours, theirs = losses_of(base, wrapped(lorainit.Orthogonal(), 0, **changes), pools)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_the_forward_does_not_know_is_refused():
    for changes in ({"final_logit_softcapping": 30.0}, {"attn_logit_softcapping": 50.0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            stacked(**changes)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_loss_in_pieces_is_the_loss(rows):
    torch.manual_seed(0)
    hidden = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    head, targets = torch.randn(50, 6, dtype=torch.float64), torch.randint(50, (10,))
    weights = torch.rand(10)
    whole = F.cross_entropy(hidden @ head.mT, targets, reduction="none")
    (wanted,) = torch.autograd.grad((whole * weights).sum(), hidden)
    losses, right = gemma.PiecewiseLoss.apply(hidden, head, targets, rows)
    (found,) = torch.autograd.grad((losses * weights).sum(), hidden)
    # Logits are rounded to float32 on the way.
    torch.testing.assert_close(losses.double(), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(right, (hidden @ head.mT).argmax(-1) == targets)
    best = (hidden @ head.mT).argmax(-1)
    assert gemma.PiecewiseLoss.apply(hidden, head, best, rows)[1].all()


def test_bfloat16_training_stays_near_float32(pools):
    """Twenty steps: what rounding costs is small beside what training brings."""
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        trainer = trainer_of(stacked(dtype), pools, stack=1, max_steps=20, evaluation_rows=40)
        job = Job(start_of(wrapped(lorainit.Orthogonal(), 0)), 1e-2, batch_order(64, 64, 0, 20, 8))
        ends[dtype] = trainer.run([job], curve=pools["validation"], curve_at=[0, 20])[0].curve
    wide, narrow = ends[torch.float32], ends[torch.bfloat16]
    assert narrow[0] == pytest.approx(wide[0], rel=1e-2)
    assert abs(narrow[20] - wide[20]) < 0.05 * (wide[0] - wide[20])


@pytest.mark.parametrize("name", ["natural", "lora-one", "lora-da"])
def test_starts_from_data_are_what_a_stack_takes(pools, name):
    """What the package collects on Gemma becomes a start, and the base is as it was."""
    model = base_model()
    before = [p.clone() for p in model.parameters()]
    run = Experiment(
        "chain_sum",
        name,
        1e-3,
        rank=4,
        train_samples=48,
        statistics_samples=32,
        model="gemma-3-270m",
    )
    start = Initialiser(model, batch_size=8)(run, pools["train"]).start
    for ours, theirs in zip(model.parameters(), before, strict=True):
        assert torch.equal(ours, theirs)
    assert len(start.factors) == 21
    trainer = trainer_of(stacked(), pools, stack=1, scaling=run.scaling, anchored=start.anchored)
    outcome = trainer.run(
        [Job(start, 1e-3, batch_order(64, 48, 0, 4, 8))], start_scores={"train": pools["train"]}
    )[0]
    assert outcome.finite
    assert len(outcome.train_loss) == 4
