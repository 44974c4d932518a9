"""One pass block by block gives what ordinary passes give, for every kind of model, batch and statistic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
import transformers as hf
from peft import LoraConfig
from torch import Tensor, nn

import lorainit
from lorainit.adapters.targets import match_targets
from lorainit.errors import NonFiniteError
from lorainit.statistics.blocks.calls import NotByBlocksError
from lorainit.statistics.loss.own_loss import OwnLoss
from lorainit.statistics.memory.peak import held_bytes
from lorainit.types import STATISTICS, LayerStatistics
from tests.adapters.tiny import batch as tiny_batch
from tests.life.test_quantized_kinds import config as quantized_config
from tests.life.test_quantized_kinds import quantized
from tests.measuring import collected, planned
from tests.statistics import models
from tests.statistics.by_blocks import collected_by_blocks, planned_by_blocks
from tests.statistics.kinds import KINDS as KINDS_BY_LOSS
from tests.statistics.kinds import made, together

NEEDS = frozenset(STATISTICS)
Data = list[dict[str, Tensor]]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    targets = match_targets(model, models.all_linear()).layers
    return {name: target.module for name, target in targets.items()}


def padded(side: str = "right") -> Data:
    return models.batches(models.sequences(), 3, side=side)


def packed() -> Data:
    rows = models.sequences()
    return [models.pack(rows[:4]), models.pack(rows[4:])]


def images() -> Data:
    torch.manual_seed(3)
    return [
        {"pixel_values": torch.randn(n, 1, 8, 8), "labels": torch.arange(n) % 3} for n in (3, 2)
    ]


def assert_equal(found: Any, truth: Any, tolerance: float = 1e-9) -> None:
    assert list(found) == list(truth)
    for name in truth:
        for field in LayerStatistics.TENSORS:
            one, other = getattr(found[name], field), getattr(truth[name], field)
            assert (one is None) == (other is None), (name, field)
            if other is not None:
                torch.testing.assert_close(
                    one, other, rtol=tolerance, atol=tolerance * float(other.abs().max() + 1e-30)
                )
        for count in ("positions", "sequences", "label_tokens"):
            assert getattr(found[name], count) == getattr(truth[name], count), (name, count)


SIZES: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


def gemma() -> Any:
    """Its layers take turns with two masks and two rotations."""
    config = hf.Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=4, pad_token_id=0, num_key_value_heads=1
    )
    return made(lambda: hf.Gemma3ForCausalLM(config)).double()


def mixture() -> Any:
    config = hf.MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=4, pad_token_id=0)
    return made(lambda: hf.MixtralForCausalLM(config)).double()


def bart() -> Any:
    config = hf.BartConfig(
        vocab_size=models.VOCABULARY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return made(lambda: hf.BartForConditionalGeneration(config)).double()


KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Data]]] = {
    "Llama, padded": (lambda: models.llama(torch.float64), padded),
    "Llama, padded on the left": (lambda: models.llama(torch.float64), lambda: padded("left")),
    "Llama, packed": (lambda: models.llama(torch.float64), packed),
    "Gemma, two masks": (gemma, padded),
    "GPT-2": (lambda: models.gpt2(torch.float64), padded),
    "BERT, tokens": (lambda: models.bert(torch.float64, "MaskedLM"), padded),
    "BERT, classes": (
        lambda: models.bert(torch.float64, "SequenceClassification", num_labels=3),
        lambda: models.classified(models.sequences(), 3, 3),
    ),
    "ViT": (lambda: models.vit(torch.float64), lambda: [models.to_float64(b) for b in images()]),
    "T5": (
        lambda: models.t5(torch.float64),
        lambda: models.seq2seq(models.sequences(), 3),
    ),
    "BART": (bart, lambda: models.seq2seq(models.sequences(), 3)),
    "Mixtral": (mixture, padded),
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_ordinary_pass(kind: str) -> None:
    build, data = KINDS[kind]
    model, batches = build(), data()
    modules = layers_of(model)
    truth = collected(model, modules, batches, NEEDS)
    assert_equal(collected_by_blocks(model, modules, batches, NEEDS), truth)
    # The control: without one sequence they are others.
    with pytest.raises(AssertionError):
        assert_equal(collected_by_blocks(model, modules, batches[1:], NEEDS), truth)


@pytest.mark.parametrize(
    "needs",
    [{"gradient"}, {"input_second_moment", "input_mean"}, {"gradient", "output_second_moment_diagonal"}],
    ids=["gradient", "forward alone", "diagonal"],
)  # fmt: skip
def test_every_kind_of_statistic(needs: set[str]) -> None:
    model, batches = models.llama(torch.float64), padded()
    modules = layers_of(model)
    truth = collected(model, modules, batches, needs)
    assert_equal(collected_by_blocks(model, modules, batches, needs), truth)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_reduction": "token"},
        {"token_mask": "labels"},
        {"gradient_dtype": "bfloat16"},
        {"loss_fn": lambda model, batch: model(**batch, use_cache=False).logits.logsumexp(-1).mean(-1)},
    ],
    ids=["token", "labels", "bfloat16", "loss_fn"],
)  # fmt: skip
def test_every_setting(options: dict[str, Any]) -> None:
    model, batches = models.llama(torch.float64), padded()
    modules = layers_of(model)
    truth = collected(model, modules, batches, NEEDS, **options)
    assert_equal(collected_by_blocks(model, modules, batches, NEEDS, **options), truth)


def test_the_models_own_loss_sequence_by_sequence() -> None:
    model = models.llama(torch.float64)
    modules, batches = layers_of(model), models.batches(models.sequences(), 1)
    options = {"loss_fn": OwnLoss("sequence")}
    truth = collected(model, modules, batches, NEEDS, **options)
    assert_equal(collected_by_blocks(model, modules, batches, NEEDS, **options), truth)


def test_layers_of_a_block_in_several_parts() -> None:
    model, batches = models.llama(torch.float64), padded()
    modules = layers_of(model)
    planned = planned_by_blocks(model, modules, batches, NEEDS, room=14_000)
    assert planned.blocks is not None
    assert len(planned.blocks.groups) > 2 * len(planned.blocks.chain.blocks)
    truth = collected(model, modules, batches, NEEDS)
    assert_equal(collected_by_blocks(model, modules, batches, NEEDS, room=14_000), truth)


def test_layers_outside_of_the_blocks() -> None:
    """A projection before the blocks and a head after them."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(5, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
            self.between, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, **_: Any) -> Tensor:
            x = torch.tanh(self.before(x))
            for i, block in enumerate(self.blocks):
                x = block(x) + (self.between(x) if i == 1 else 0)
            return self.head(x)

    torch.manual_seed(0)
    model = Odd().double()
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    batches = [{"x": torch.randn(n, 5).double(), "labels": torch.arange(n) % 3} for n in (4, 3)]
    truth = collected(model, modules, batches, NEEDS)
    assert_equal(collected_by_blocks(model, modules, batches, NEEDS), truth)


def test_blocks_below_the_first_target_are_left_alone() -> None:
    config = hf.LlamaConfig(**SIZES, num_key_value_heads=1)
    model = made(lambda: hf.LlamaForCausalLM(config)).double()
    modules = {n: m for n, m in layers_of(model).items() if "layers.0." not in n}
    planned = planned_by_blocks(model, modules, padded(), NEEDS)
    assert planned.blocks is not None
    assert len(planned.blocks.chain.blocks) == 2
    truth = collected(model, modules, padded(), NEEDS)
    assert_equal(collected_by_blocks(model, modules, padded(), NEEDS), truth)


def test_gradient_checkpointing_is_not_needed_and_stays_on() -> None:
    model, batches = models.llama(torch.float64), padded()
    modules = layers_of(model)
    truth = collected(model, modules, batches, NEEDS)
    model.gradient_checkpointing_enable()
    model.train()
    assert_equal(collected_by_blocks(model, modules, batches, NEEDS), truth)
    assert model.training
    assert model.is_gradient_checkpointing


def test_a_model_in_half_precision_gives_the_same_to_its_rounding() -> None:
    model, batches = models.llama(torch.bfloat16), padded()
    modules = layers_of(model)
    truth = collected(model, modules, batches, NEEDS)
    assert_equal(collected_by_blocks(model, modules, batches, NEEDS), truth, 1e-2)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_sequences_whose_loss_is_not_finite(policy: str) -> None:
    model, batches = models.llama(torch.float64), padded()

    def loss(model: Any, batch: Any) -> Tensor:
        found = model(input_ids=batch["input_ids"], use_cache=False).logits.logsumexp(-1).mean(-1)
        bad = batch["input_ids"][:, 0] == int(batches[1]["input_ids"][0, 0])
        return torch.where(bad, torch.nan, found)

    modules = layers_of(model)
    options = {"loss_fn": loss, "on_nonfinite": policy}
    if policy == "raise":
        with pytest.raises(NonFiniteError, match="batch 1"):
            collected_by_blocks(model, modules, batches, NEEDS, **options)
        return
    truth = collected(model, modules, batches, NEEDS, **options)
    assert truth.metadata["skipped_sequences"] > 0
    assert_equal(collected_by_blocks(model, modules, batches, NEEDS, **options), truth)


class Chain(nn.Module):
    """Three blocks, called as `way` says."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layers = nn.ModuleList(nn.Sequential(nn.Tanh(), nn.Linear(5, 5)) for _ in range(3))
        self.head = nn.Linear(5, 3)
        self.seen = 0

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if self.way == "written to":
                x.mul_(2)
        if self.way == "twice":
            x = self.layers[0](x)
        if self.way == "past the block":
            x = x + self.layers[2][1](x)
        if self.way == "other every time":
            self.seen += 1
            x = x * self.seen
        return self.head(x)


@pytest.mark.parametrize("way", ["twice", "past the block", "other every time"])
def test_what_is_no_chain_is_found_out(way: str) -> None:
    """Called twice, called beside its block, or with a state of its own."""
    torch.manual_seed(0)
    model = Chain(way).double()
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    batches = [{"x": torch.randn(4, 5).double(), "labels": torch.arange(4) % 3}]
    with pytest.raises(NotByBlocksError):
        collected_by_blocks(model, modules, batches, NEEDS)


@pytest.mark.parametrize("way", ["", "written to"])
def test_what_is_a_chain_is_one(way: str) -> None:
    torch.manual_seed(0)
    model = Chain(way).double()
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    batches = [{"x": torch.randn(4, 5).double(), "labels": torch.arange(4) % 3}]
    truth = collected(model, modules, batches, NEEDS)
    assert_equal(collected_by_blocks(model, modules, batches, NEEDS), truth)


def test_a_block_that_computes_otherwise_the_second_time_is_found_out() -> None:
    class Unsteady(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(5, 5), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x) * self.calls

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Unsteady() for _ in range(2))

        def forward(self, x: Tensor, **_: Any) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model = Model().double()
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    batches = [{"x": torch.randn(4, 5).double(), "labels": torch.arange(4) % 3}]
    with pytest.raises(NotByBlocksError, match="others"):
        collected_by_blocks(model, modules, batches, NEEDS)


class _Counting(dict[str, Tensor]):
    """Offloaded weights; counts how often they are fetched."""

    fetched = 0

    def __getitem__(self, key: str) -> Tensor:
        type(self).fetched += 1
        return super().__getitem__(key)


def test_offloaded_weights_travel_once_for_all_batches_of_a_block() -> None:
    model, batches = models.llama(torch.float64), padded()
    truth = collected(model, layers_of(model), batches, NEEDS)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    modules = layers_of(model)
    planned = planned_by_blocks(model, modules, batches, NEEDS)
    hook = model.model.layers[0].mlp.down_proj._hf_hook
    hook.weights_map = _Counting({"weight": hook.weights_map["weight"]})
    _Counting.fetched = 0
    found: dict[str, LayerStatistics] = {}
    for part in planned.parts():
        found |= dict(part)
    # Once a batch in the forward pass over all blocks, and once more for all of them together.
    assert _Counting.fetched == len(batches) + 1
    assert_equal({name: found[name] for name in truth}, truth)
    assert all(p.is_meta for p in model.model.layers.parameters())
    with torch.no_grad():
        model(**batches[0])


@pytest.mark.parametrize("kind", ["nf4", "llm.int8", "hqq4", "torchao-int8"])
def test_quantized_bases(kind: str) -> None:
    model = quantized(kind)
    targets = match_targets(model, quantized_config()).layers
    modules = {name: target.module for name, target in targets.items()}
    data = [tiny_batch(), tiny_batch()]
    truth = collected(model, modules, data, NEEDS)
    assert_equal(collected_by_blocks(model, modules, data, NEEDS), truth, 1e-5)


@pytest.mark.parametrize("name", ["gemma3", "bert spans", "t5 classes"])
def test_other_kinds_of_models(name: str) -> None:
    """A vision tower and a decoder; answer spans; an encoder-decoder with classes."""
    kind = KINDS_BY_LOSS[name]
    model = made(kind.build).double()
    modules, rows = layers_of(model), [models.to_float64(row) for row in kind.rows()]
    data = rows if kind.own else [together(rows[:2]), together(rows[2:])]
    options: dict[str, Any] = {"loss_fn": OwnLoss("sequence")} if kind.own else {}
    truth = collected(model, modules, data, NEEDS, **options)
    assert_equal(collected_by_blocks(model, modules, data, NEEDS, **options), truth, 1e-8)


def test_losses_of_routers_are_seen_to_be_others() -> None:
    """They follow from what the routers inside the blocks give, not from the blocks' outputs."""
    kind = KINDS_BY_LOSS["mixtral, router losses"]
    model = made(kind.build).double()
    with pytest.raises(NotByBlocksError, match="others"):
        collected_by_blocks(
            model, layers_of(model), kind.rows(), NEEDS, loss_fn=OwnLoss("sequence")
        )


@pytest.mark.parametrize("head", [False, True])
def test_blocks_that_give_an_object_of_their_own_are_left_to_passes(head: bool) -> None:
    """Also where the head is a target, so that the loss has a graph without them."""

    class Held:
        def __init__(self, hidden: Tensor) -> None:
            self.hidden = hidden

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, held: Held) -> Held:
            return Held(torch.tanh(self.linear(held.hidden)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor, **_: Any) -> Tensor:
            held = Held(x)
            for layer in self.layers:
                held = layer(held)
            return self.head(held.hidden)

    torch.manual_seed(0)
    model = Model().double()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    modules = {n: m for n, m in linear.items() if head or n != "head"}
    batches = [{"x": torch.randn(4, 5).double(), "labels": torch.arange(4) % 3}]
    with pytest.raises(NotByBlocksError):
        collected_by_blocks(model, modules, batches, NEEDS)


def test_an_embedding_and_the_head_are_outside_of_the_blocks() -> None:
    model, batches = models.llama(torch.float64), padded()
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj", "down_proj", "lm_head"])
    needs, within = NEEDS, held_bytes(model, torch.device("cpu")) + 130_000
    truth, found = (
        lorainit.collect_statistics(
            model, config, data=batches, needs=needs, max_memory=budget, progress=False
        )
        for budget in (None, within)
    )
    modules = {name: target.module for name, target in match_targets(model, config).layers.items()}
    assert planned(model, modules, batches, needs, max_memory=within).blocks is not None
    assert truth["model.embed_tokens"].input_counts is not None
    assert_equal(found, truth)
