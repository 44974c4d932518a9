"""What must not change the statistics, each with a control in which something else does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorainit
from lorainit.types import STATISTICS
from tests.statistics import models
from tests.statistics.models import Batch, all_linear, batches, sequences
from tests.statistics.test_against_autograd import collect

ROWS = sequences(7)
SAME = 2e-6
"""Relative: transformers' norms and softmaxes round to float32 inside a float64 model."""

OTHER = 1e-3

QUANTITIES = ("gradient", "input_second_moment", "input_mean", "output_second_moment")
COUNTS = ("sequences", "label_tokens", "positions")


def difference(found: lorainit.Statistics, other: lorainit.Statistics) -> dict[str, float]:
    """Largest relative Frobenius distance over the layers, by quantity."""
    assert set(found) == set(other)
    worst = dict.fromkeys(QUANTITIES, 0.0)
    for name, layer in found.items():
        for key in QUANTITIES:
            a, b = getattr(layer, key), getattr(other[name], key)
            worst[key] = max(worst[key], float((a - b).norm() / b.norm()))
    return worst


def counts(found: lorainit.Statistics) -> set[tuple[float, ...]]:
    return {tuple(getattr(layer, count) for count in COUNTS) for layer in found.values()}


def assert_same(found: lorainit.Statistics, other: lorainit.Statistics) -> None:
    assert max(difference(found, other).values()) <= SAME
    assert counts(found) == counts(other)


def llama(**settings: Any) -> Any:
    return models.llama(torch.float64, **settings)


@pytest.fixture(scope="module")
def alone() -> lorainit.Statistics:
    """One sequence at a time, no padding, eval mode: what all else is compared with."""
    return collect(llama(), batches(ROWS, 1))


@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("extra", [0, 5])
def test_batch_size_and_padding(
    alone: lorainit.Statistics, size: int, side: str, extra: int
) -> None:
    assert_same(collect(llama(), batches(ROWS, size, side=side, extra=extra)), alone)


@pytest.mark.parametrize("token_mask", ["attention", "labels"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_batch_size_under_every_mask_and_reduction(token_mask: str, reduction: str) -> None:
    settings = {"token_mask": token_mask, "loss_reduction": reduction}
    one = collect(llama(), batches(ROWS, 1), **settings)
    assert_same(collect(llama(), batches(ROWS, 4, extra=2), **settings), one)


def test_order(alone: lorainit.Statistics) -> None:
    order = torch.randperm(len(ROWS)).tolist()
    assert order != sorted(order)
    assert_same(collect(llama(), batches([ROWS[i] for i in order], 3)), alone)


@pytest.mark.parametrize("extra", [0, 4])
def test_padding_of_both_sides_of_a_sequence_to_sequence_model(extra: int) -> None:
    model = models.t5(torch.float64)
    one = collect(model, models.seq2seq(ROWS, 1))
    assert_same(collect(model, models.seq2seq(ROWS, 4, extra=extra)), one)


class TestControls:
    """Things that are not the same data, by which the comparisons above are known to see."""

    def test_padding_without_its_mask_differs(self, alone: lorainit.Statistics) -> None:
        data = batches(ROWS, 3, extra=4)
        for batch in data:
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        worst = difference(collect(llama(), data), alone)
        assert worst["input_second_moment"] > OTHER
        assert worst["output_second_moment"] > OTHER
        # Causal attention on the left of right padding does not see it: the mask leaves G alone.
        assert worst["gradient"] <= SAME

    def test_other_data_differ(self, alone: lorainit.Statistics) -> None:
        found = collect(llama(), batches([*ROWS[:-1], ROWS[0]], 3))
        assert min(difference(found, alone).values()) > OTHER

    def test_token_masks_differ(self, alone: lorainit.Statistics) -> None:
        worst = difference(collect(llama(), batches(ROWS, 1), token_mask="labels"), alone)
        assert worst["input_second_moment"] > OTHER
        assert worst["gradient"] <= SAME

    def test_loss_reductions_differ(self, alone: lorainit.Statistics) -> None:
        worst = difference(collect(llama(), batches(ROWS, 1), loss_reduction="token"), alone)
        assert worst["gradient"] > OTHER
        assert worst["output_second_moment"] > OTHER
        assert worst["input_second_moment"] <= SAME

    def test_a_batchs_mean_loss_differs_with_the_batches(self, alone: lorainit.Statistics) -> None:
        """What a hook on a model's own loss would collect: right one by one, wrong in batches."""

        def own(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            loss: Tensor = model(**batch).loss
            return loss.double().expand(len(batch["labels"]))

        assert (
            max(difference(collect(llama(), batches(ROWS, 1), loss_fn=own), alone).values()) < 1e-5
        )
        worst = difference(collect(llama(), batches(ROWS, 3), loss_fn=own), alone)
        assert worst["gradient"] > OTHER
        assert worst["output_second_moment"] > OTHER


# --- packed rows --------------------------------------------------------------------------------


def unmasked() -> list[Batch]:
    """Labels at every token: across a boundary the last token would predict the next's first."""
    return [row | {"labels": row["input_ids"].clone()} for row in ROWS]


@pytest.mark.parametrize("token_mask", ["attention", "labels"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_packed_rows_are_their_sequences(token_mask: str, reduction: str) -> None:
    rows = unmasked()
    settings = {"token_mask": token_mask, "loss_reduction": reduction}
    packed = [models.pack(rows[:3]), models.pack(rows[3:])]
    assert_same(
        collect(llama(), packed, **settings), collect(llama(), batches(rows, 1), **settings)
    )


def test_rows_that_do_not_say_that_they_are_packed_differ() -> None:
    rows = unmasked()
    packed = models.pack(rows)
    del packed["position_ids"]
    found = collect(llama(), [packed])
    assert min(difference(found, collect(llama(), batches(rows, 1))).values()) > OTHER
    assert next(iter(found.values())).sequences == 1


# --- checkpointing, modes, wrappers ---------------------------------------------------------------


class Calls:
    """Counts forward calls of a layer, and how many of them had gradients on."""

    def __init__(self, module: nn.Module) -> None:
        self.total = self.with_gradient = 0
        self.handle = module.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.total += 1
        self.with_gradient += torch.is_grad_enabled()


CHECKPOINTED = {
    "llama": (llama, lambda size: batches(ROWS, size), "model.layers.0.mlp.up_proj"),
    "gpt2": (
        lambda: models.gpt2(torch.float64, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5),
        lambda size: batches(ROWS, size),
        "transformer.h.0.mlp.c_fc",
    ),
    "t5": (
        lambda: models.t5(torch.float64, dropout_rate=0.5),
        lambda size: models.seq2seq(ROWS, size),
        "encoder.block.0.layer.0.SelfAttention.q",
    ),
    "vit": (
        lambda: models.vit(torch.float64, hidden_dropout_prob=0.5),
        lambda size: [
            {"pixel_values": images, "labels": torch.arange(len(images)) % 3}
            for images in torch.linspace(-1, 1, 7 * 64).double().sin().view(7, 1, 8, 8).split(size)
        ],
        None,
    ),
    "whisper": (
        lambda: models.whisper(
            torch.float64,
            dropout=0.5,
            activation_dropout=0.5,
            encoder_layerdrop=0.5,
            decoder_layerdrop=0.5,
        ),
        lambda size: [
            {
                "input_features": features,
                "labels": torch.arange(3, 3 + 5 * len(features)).view(-1, 5),
            }
            for features in torch.linspace(-9, 9, 4 * 160).double().cos().view(4, 8, 20).split(size)
        ],
        "model.encoder.layers.0.self_attn.q_proj",
    ),
}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved-tensor hooks"])
@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    """In train mode, where layers recompute; with dropout rates that would show."""
    build, data_of, layer = CHECKPOINTED[kind]
    data = data_of(3)
    plain = build()
    expected = collect(plain, data)
    model = build()
    model.load_state_dict(plain.state_dict())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    calls = Calls(model.get_submodule(layer or next(iter(expected))))
    found = collect(model, data)
    # Two more are of one sequence, by which the default loss is compared with the model's own.
    assert calls.total == 2 + 2 * len(data), "the forward was not recomputed"
    assert calls.with_gradient == (len(data) if reentrant else 2 * len(data))
    assert max(difference(found, expected).values()) <= 1e-12
    assert counts(found) == counts(expected)
    # Reentry detaches what goes into each block, so nothing is known to be shared across blocks.
    groups = shared_groups(expected)
    assert all(any(part <= whole for whole in groups) for part in shared_groups(found))
    assert len(shared_groups(found)) < len(found) or len(groups) == len(found)
    assert model.training
    assert all(module.training for module in model.modules())


def test_gradient_checkpointing_counts_once_what_a_naive_hook_counts_twice() -> None:
    model, data = llama(), batches(ROWS, 3)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    rows = 0

    def naive(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal rows
        if torch.is_grad_enabled():
            rows += args[0].shape[0] * args[0].shape[1]

    model.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(naive)
    found = collect(model, data)
    assert rows == 2 * sum(batch["input_ids"].numel() for batch in data)
    positions = sum(int(batch["attention_mask"].sum()) for batch in data)
    assert {layer.positions for layer in found.values()} == {positions}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_the_users_own(reentrant: bool) -> None:
    class Model(models.Perceptron):
        def forward(self, x: Tensor, **_: Any) -> Any:
            x = self.layers[0](x)
            return torch.utils.checkpoint.checkpoint(self._rest, x, use_reentrant=reentrant)

        def _rest(self, x: Tensor) -> Tensor:
            return self.layers[1](torch.tanh(x))

    model, plain = Model().double(), models.Perceptron().double()
    data = [{"x": torch.randn(4, 5).double(), "labels": torch.arange(4) % 3} for _ in range(2)]
    config = models.LoraConfig(r=2, target_modules=["layers.0", "layers.1"])
    found, expected = (collect(m, data, config=config) for m in (model, plain))
    assert max(difference(found, expected).values()) <= 1e-12


def test_train_mode_with_dropout_is_eval_mode() -> None:
    settings = {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}
    data = batches(ROWS, 3)
    model = models.gpt2(torch.float64, **settings)
    expected = collect(model.eval(), data)
    found = collect(model.train(), data)
    assert max(difference(found, expected).values()) == 0
    with torch.no_grad():
        assert not torch.equal(model(**data[0]).logits, model.eval()(**data[0]).logits)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
def test_a_wrapped_model_is_its_base(alone: lorainit.Statistics, settings: Any) -> None:
    from peft import get_peft_model

    model = get_peft_model(llama(), all_linear(init_lora_weights=False, **settings)).train()
    data = batches(ROWS, 1)
    with torch.no_grad():
        assert not torch.equal(model(**data[0]).logits, llama()(**data[0]).logits)
    found = collect(model, data)
    assert max(difference(found, alone).values()) == 0
    assert shared_groups(found) == shared_groups(alone)


# --- the cap ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_cap_is_exact(size: int) -> None:
    found = collect(llama(), batches(ROWS, size), max_sequences=5)
    assert_same(found, collect(llama(), batches(ROWS[:5], 5)))
    assert next(iter(found.values())).sequences == 5


def test_without_a_cap_all_is_read(alone: lorainit.Statistics) -> None:
    found = collect(llama(), batches(ROWS, 3), max_sequences=None)
    assert_same(found, alone)


@pytest.mark.parametrize("cap", [1, 3, 6])
def test_nothing_is_drawn_beyond_the_cap(cap: int) -> None:
    drawn = 0

    def draw() -> Any:
        nonlocal drawn
        for batch in batches(ROWS, 3):
            drawn += 1
            yield batch

    collect(llama(), draw(), max_sequences=cap)
    assert drawn == -(-cap // 3)


def test_the_cap_counts_packed_sequences() -> None:
    packed = [models.pack(ROWS[:3]), models.pack(ROWS[3:5]), models.pack(ROWS[5:])]
    found = collect(llama(), packed, max_sequences=5)
    assert next(iter(found.values())).sequences == 5


def test_the_cap_takes_padded_position_ids_for_padding() -> None:
    """Collators pad position ids with zeros, which look like starts."""
    packed = models.pack(ROWS[:3])
    for key, fill in (("input_ids", 0), ("labels", -100), ("position_ids", 0)):
        packed[key] = nn.functional.pad(packed[key], (0, 6), value=fill)
    found = collect(llama(), [packed, *batches(ROWS[3:], 2)], max_sequences=5)
    assert next(iter(found.values())).sequences == 5


# --- who shares what ------------------------------------------------------------------------------


def shared_groups(found: lorainit.Statistics) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, layer in found.items():
        groups.setdefault(id(layer.input_second_moment_sum), set()).add(name)
    return {frozenset(group) for group in groups.values()}


@pytest.mark.parametrize("needs", [STATISTICS, {"input_second_moment"}], ids=["all", "inputs"])
def test_layers_that_read_one_tensor_share_it(needs: Any) -> None:
    found = collect(llama(), batches(ROWS, 3), needs=needs)
    expected = set()
    for layer in ("model.layers.0", "model.layers.1"):
        expected |= {
            frozenset(f"{layer}.self_attn.{x}_proj" for x in "qkv"),
            frozenset(f"{layer}.mlp.{x}_proj" for x in ("gate", "up")),
            frozenset({f"{layer}.self_attn.o_proj"}),
            frozenset({f"{layer}.mlp.down_proj"}),
        }
    assert shared_groups(found) == expected


def test_cross_attention_shares_the_encoders_output() -> None:
    found = collect(models.t5(torch.float64), models.seq2seq(ROWS, 3))
    sharing = max(shared_groups(found), key=len)
    assert sharing == {
        f"decoder.block.{i}.layer.1.EncDecAttention.{x}" for i in range(2) for x in "kv"
    }


class Pair(nn.Module):
    """Two layers that read what `routes` says in each batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = (nn.Linear(5, 4, bias=False) for _ in range(2))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor, route: str) -> Tensor:
        other = torch.sin(x)
        z = {
            "both": lambda: self.left(x) + self.right(x),
            "apart": lambda: self.left(x) + self.right(other),
            "swapped": lambda: self.left(other) + self.right(x),
            "left only": lambda: self.left(x),
            "right only": lambda: self.right(x),
            "left twice": lambda: self.left(x) * self.left(other) + self.right(x),
            "left twice on one": lambda: self.left(x) * self.left(x) + self.right(x),
        }[route]()
        return self.out(torch.tanh(z))


ROUTES = [
    ["both", "apart"],
    ["apart", "both"],
    ["both", "left only", "right only"],
    ["left only", "both"],
    ["both", "swapped"],
    ["left twice", "both"],
    ["both", "left twice"],
    ["left twice on one"],
    ["both", "left twice on one"],
]


@pytest.mark.parametrize("routes", ROUTES, ids=" then ".join)
def test_layers_whose_sharing_changes_are_still_right(routes: Sequence[str]) -> None:
    from tests.statistics import reference
    from tests.statistics.test_against_autograd import assert_true

    model = Pair().double()
    config = models.LoraConfig(r=2, target_modules=["left", "right"])
    data = [
        {"x": torch.randn(4, 5).double(), "labels": torch.arange(4) % 3, "route": route}
        for route in routes
    ]
    found = collect(model, data, config=config)
    assert_true(found, reference.reference(model, list(found), data, reference.one_label))
    inputs = collect(model, data, config=config, needs={"input_second_moment"})
    for name, layer in found.items():
        torch.testing.assert_close(
            inputs[name].input_second_moment, layer.input_second_moment, rtol=1e-12, atol=0
        )


def test_two_layers_with_one_weight_have_their_own_statistics() -> None:
    model = Pair().double()
    model.right.weight = model.left.weight
    config = models.LoraConfig(r=2, target_modules=["left", "right"])
    data = [{"x": torch.randn(6, 5).double(), "labels": torch.arange(6) % 3, "route": "apart"}]
    found = collect(model, data, config=config)
    losses = nn.functional.cross_entropy(model(data[0]["x"], "apart"), data[0]["labels"])
    (both,) = torch.autograd.grad(losses, [model.left.weight])
    torch.testing.assert_close(found["left"].gradient + found["right"].gradient, both)
    assert not torch.allclose(found["left"].gradient, found["right"].gradient)


def test_one_layer_under_two_names_counts_every_use() -> None:
    from tests.statistics import reference
    from tests.statistics.test_against_autograd import assert_true

    model = Pair().double()
    model.right = model.left
    config = models.LoraConfig(r=2, target_modules=["left", "right"])
    data = [{"x": torch.randn(6, 5).double(), "labels": torch.arange(6) % 3, "route": "apart"}]
    found = collect(model, data, config=config)
    assert list(found) == ["left"]
    assert found["left"].positions == 12
    assert_true(found, reference.reference(model, ["left"], data, reference.one_label))


@pytest.mark.parametrize("shape", ["leading", "flat", "both"])
def test_inputs_of_other_layouts_count_by_the_same_mask(shape: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(models.VOCABULARY, 6)
            self.layer = nn.Linear(6, 6)
            self.head = nn.Linear(6, models.VOCABULARY)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, layout: str) -> Tensor:
            x = self.embed(input_ids)
            shapes = {
                "plain": x.shape,
                "leading": (1, *x.shape),
                "flat": (x.shape[0] * x.shape[1], 6),
                "both": (1, 1, x.shape[0] * x.shape[1], 6),
            }
            return self.head(torch.tanh(self.layer(x.reshape(shapes[layout]))).reshape(x.shape))

    model = Model().double()
    config = models.LoraConfig(r=2, target_modules=["layer"])
    for size in (1, 3):
        data = batches(ROWS, size)
        plain = collect(model, [b | {"layout": "plain"} for b in data], config=config)
        assert_same(collect(model, [b | {"layout": shape} for b in data], config=config), plain)
    assert counts(plain) == {
        (7.0, plain["layer"].label_tokens, float(sum(len(r["input_ids"]) for r in ROWS)))
    }
