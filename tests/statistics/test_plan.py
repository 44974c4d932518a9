"""The plan's bytes are those of the tensors, and several passes give what one gives."""

from __future__ import annotations

import gc
import importlib
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import lorainit
from lorainit.adapters.targets import match_targets
from lorainit.data.batch import Batch
from lorainit.errors import MemoryPlanError
from lorainit.linalg.block_triangle import FOLD_FROM, mirror, panels
from lorainit.statistics import CollectSettings
from lorainit.statistics.collect.accumulators import add_gram
from lorainit.statistics.memory import planner
from lorainit.statistics.memory.peak import LiveBytes, held_bytes
from lorainit.statistics.memory.plan import (
    BatchSize,
    make_plan,
    statistic_bytes,
    total_bytes,
)
from lorainit.types import STATISTICS, LayerStatistics
from lorainit.types.byte_size import parse_bytes
from tests.measuring import collected, planned

collecting = importlib.import_module("lorainit.statistics.collection")

NEEDS = frozenset(STATISTICS)
LORA_DA = frozenset({"gradient", "input_second_moment", "output_second_moment_diagonal"})


def model_and_modules(hidden: int = 16, inner: int = 40, layers: int = 2, vocabulary: int = 31):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=vocabulary,
        )
    ).eval()
    targets = match_targets(model, LoraConfig(r=2, target_modules="all-linear")).layers
    return model, {name: target.module for name, target in targets.items()}


def batches(rows: int = 3, length: int = 8, count: int = 1, vocabulary: int = 31):
    ids = torch.randint(0, vocabulary, (count, rows, length))
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]


def shapes_of(modules) -> dict[str, tuple[int, int]]:
    return {name: tuple(module.weight.shape) for name, module in modules.items()}


def assert_same(one, other) -> None:
    assert list(one) == list(other)
    assert one.metadata == other.metadata
    for name in one:
        for field in LayerStatistics.TENSORS:
            first, second = getattr(one[name], field), getattr(other[name], field)
            assert (first is None) == (second is None)
            if first is not None:
                torch.testing.assert_close(first, second)
        assert one[name].positions == other[name].positions


@pytest.mark.parametrize(
    "needs", [NEEDS, frozenset({"gradient"}), frozenset({"input_second_moment"})]
)
def test_predicted_bytes_are_the_tensors(needs: frozenset[str]) -> None:
    model, modules = model_and_modules()
    found = collected(model, modules, batches(), needs)
    shapes = shapes_of(modules)
    shared: dict[int, list[str]] = {}
    for name in found:
        shared.setdefault(id(found[name].input_second_moment_sum), []).append(name)
    groups = list(shared.values()) if "input_second_moment" in needs else []
    assert total_bytes(shapes, needs, shared=groups) == found.nbytes
    assert total_bytes(shapes, needs) >= found.nbytes


@pytest.fixture
def passes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no model were a chain of blocks."""
    monkeypatch.setattr(planner, "_rehearsal", lambda *_: "it is a test of passes")


@pytest.mark.usefixtures("passes_alone")
@pytest.mark.parametrize("share", [0.9, 0.4, 0.2])
def test_several_passes_and_split_batches_give_what_one_pass_gives(share: float, caplog) -> None:
    model, modules = model_and_modules()
    data = batches(count=2)
    whole = collected(model, modules, data, NEEDS)
    easy = planned(model, modules, data, NEEDS, max_memory="1GiB").plan
    assert len(easy.passes) == 1
    assert easy.batch.rows is None
    assert easy.nbytes == whole.nbytes  # shared inputs are known before the first pass
    row = easy.batch.nbytes // 3
    budget = easy.held + row + int(share * whole.nbytes) + 1
    with caplog.at_level("INFO", logger="lorainit"):
        parts = collected(model, modules, data, NEEDS, max_memory=budget)
    plan = planned(model, modules, data, NEEDS, max_memory=budget).plan
    assert len(plan.passes) > 1
    assert plan.peak <= budget
    assert str(plan) in caplog.text
    assert "not block by block: it is a test of passes" in caplog.text
    assert_same(parts, whole)


@pytest.mark.parametrize("share", [0.9, 0.4])
def test_one_pass_block_by_block_is_taken_before_several_passes(share: float, caplog) -> None:
    model, modules = model_and_modules(hidden=64, inner=160, layers=6, vocabulary=300)
    data = batches(8, length=24, count=2, vocabulary=300)
    whole = collected(model, modules, data, LORA_DA)
    easy = planned(model, modules, data, LORA_DA, max_memory="1GiB")
    assert easy.blocks is None
    budget = easy.plan.held + easy.plan.batch.nbytes + int(share * whole.nbytes)
    with caplog.at_level("INFO", logger="lorainit"):
        parts = collected(model, modules, data, LORA_DA, max_memory=budget)
    blocks = planned(model, modules, data, LORA_DA, max_memory=budget).blocks
    assert blocks is not None
    assert blocks.peak <= budget
    assert str(blocks) in caplog.text
    assert "1 pass block by block, 6 blocks" in caplog.text
    assert blocks.nbytes == whole.nbytes
    assert_same(parts, whole)


@pytest.mark.parametrize("needs", [LORA_DA, NEEDS])
@pytest.mark.parametrize("rows", [2, 6])
def test_the_predicted_peak_block_by_block_is_within_a_tenth(needs, rows) -> None:
    model, modules = model_and_modules(hidden=64, inner=160, layers=6, vocabulary=300)
    data = batches(rows, length=48, count=4, vocabulary=300)
    easy = planned(model, modules, data, needs, max_memory="8GiB").plan
    # Neither the batches nor the statistics fit as they are.
    budget = easy.held + int(easy.batch.nbytes * 0.6) + easy.nbytes // 3
    tight = planned(model, modules, data, needs, max_memory=budget)
    assert tight.blocks is not None
    gc.collect()
    with LiveBytes() as meter:
        for part in tight.parts():
            del part
    assert tight.blocks.peak == pytest.approx(meter.peak + easy.held, rel=0.1)
    assert meter.peak + easy.held <= budget


@pytest.mark.parametrize("needs", [LORA_DA, NEEDS, frozenset({"input_second_moment"})])
@pytest.mark.parametrize("rows", [2, 6])
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(needs, rows) -> None:
    model, modules = model_and_modules(hidden=64, inner=160, vocabulary=300)
    data = batches(rows, length=48, count=3, vocabulary=300)
    plan = planned(model, modules, data, needs, max_memory="8GiB").plan
    gc.collect()
    with LiveBytes() as meter:
        collected(model, modules, data, needs)
    measured = meter.peak + held_bytes(model, torch.device("cpu"))
    assert plan.held == held_bytes(model, torch.device("cpu"))
    assert plan.peak == pytest.approx(measured, rel=0.1)


@pytest.mark.usefixtures("passes_alone")
def test_the_measured_peak_stays_within_a_tight_budget() -> None:
    model, modules = model_and_modules(hidden=64, inner=160, vocabulary=300)
    data = batches(8, length=48, count=2, vocabulary=300)
    roomy = planned(model, modules, data, LORA_DA, max_memory="8GiB").plan
    budget = roomy.held + roomy.batch.nbytes // 4 + roomy.nbytes // 3
    tight = planned(model, modules, data, LORA_DA, max_memory=budget)
    assert tight.plan.batch.rows is not None
    with LiveBytes() as meter:
        for part in tight.parts():
            del part
    assert meter.peak + roomy.held <= 1.1 * budget
    assert meter.peak + roomy.held > 0.5 * budget


def test_a_start_within_a_budget_is_the_start_without_one() -> None:
    model, _ = model_and_modules()
    model.double()
    config = LoraConfig(r=2, target_modules="all-linear")
    data = batches(count=2)
    held = held_bytes(model, torch.device("cpu"))
    starts = []
    for budget in (None, held + 400_000, held + 120_000):
        wrapped = lorainit.get_peft_model(
            model,
            config,
            method=lorainit.LoraDA(),
            data=data,
            max_memory=budget,
            progress=False,
        )
        starts.append(
            {n: p.detach().clone() for n, p in wrapped.named_parameters() if "lora_" in n}
        )
        wrapped.unload()
    for other in starts[1:]:
        assert other.keys() == starts[0].keys()
        for name in other:
            torch.testing.assert_close(other[name], starts[0][name], rtol=1e-4, atol=1e-7)


def test_too_small_a_budget_is_an_error_that_says_what_is_needed() -> None:
    model, modules = model_and_modules()
    with pytest.raises(MemoryPlanError, match="Allow"):
        planned(model, modules, batches(), NEEDS, max_memory=1000)


def test_no_pass_is_above_the_budget() -> None:
    shapes = {str(i): (8 + i, 16) for i in range(9)}
    largest = max(sum(statistic_bytes(s, NEEDS).values()) for s in shapes.values())
    plan = make_plan(shapes, NEEDS, 3 * largest)
    assert [name for group in plan.passes for name in group] == list(shapes)
    assert plan.largest <= 3 * largest
    assert len(plan.passes) <= 4
    # A guessed budget is never an error; a promised one is.
    assert len(make_plan(shapes, NEEDS, 1).passes) == len(shapes)
    with pytest.raises(MemoryPlanError):
        make_plan(shapes, NEEDS, 1, strict=True)
    assert len(make_plan(shapes, NEEDS, None).passes) == 1


def test_a_shared_input_that_two_passes_read_counts_in_both() -> None:
    shapes = {name: (2, 10) for name in "abcd"}
    needs = frozenset({"input_second_moment"})
    alone = 10 * 10 * 4
    assert total_bytes(shapes, needs, shared=["abcd"]) == alone
    assert len(make_plan(shapes, needs, alone, shared=["abcd"]).passes) == 1
    plan = make_plan(shapes, needs, 2 * alone, shared=["ab", "cd"])
    assert len(plan.passes) == 1
    plan = make_plan(shapes, needs, 2 * alone, shared=["bc"])
    assert plan.passes == (("a", "b", "c"), ("d",))
    plan = make_plan(shapes, needs, alone, shared=["bc"])
    assert plan.passes == (("a",), ("b", "c"), ("d",))


def test_small_batches_buy_fewer_passes_where_that_is_quicker() -> None:
    shapes = {str(i): (100, 100) for i in range(8)}
    layer = total_bytes({"0": (100, 100)}, LORA_DA)
    large, small = BatchSize(None, 65536, 6 * layer), BatchSize(4, 32768, 3 * layer)
    both = make_plan(shapes, LORA_DA, 8 * layer, batches=[large, small])
    assert (both.batch, len(both.passes)) == (small, 2)
    # Batches of few tokens cost too much for one pass less.
    tiny = BatchSize(1, 64, 0)
    best = make_plan(shapes, LORA_DA, 8 * layer, batches=[large, small, tiny])
    assert best.batch == small


def test_splitting_keeps_every_row_and_leaves_what_cannot_be_split() -> None:
    content = {"input_ids": torch.arange(10).reshape(5, 2), "flag": True, "words": list("abcde")}
    batch = Batch(content)
    parts = batch.cut(2)
    assert [part.rows for part in parts] == [2, 2, 1]
    assert [part.unit_names for part in parts] == [(0, 1), (2, 3), (4,)]
    assert torch.equal(torch.cat([p.content["input_ids"] for p in parts]), content["input_ids"])
    assert [w for p in parts for w in p.content["words"]] == list("abcde")
    patches = Batch({**content, "pixel_values": torch.zeros(7, 3)})
    assert not patches.separable
    assert patches.cut(2) == [patches]
    assert torch.equal(batch.first_row().content["input_ids"], content["input_ids"][:1])
    # One row of ids with the patches of all rows would be no batch of any model.
    assert patches.first_row() is patches


@pytest.mark.parametrize("width", [3, FOLD_FROM - 1, FOLD_FROM, FOLD_FROM + 77, 1100])
def test_folded_grams_are_grams(width: int) -> None:
    rows = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(0))
    total = add_gram(add_gram(None, rows[0]), rows[1])
    flat = rows.reshape(-1, width)
    if width >= FOLD_FROM:
        low, high = panels(width)[0]
        assert not total[high:, low:high].any()
    torch.testing.assert_close(mirror(total), flat.mT @ flat)


def test_a_budget_is_bytes_or_a_text() -> None:
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes(" 1.5 gb ") == 1_500_000_000
    assert parse_bytes("512") == 512
    assert parse_bytes(7) == 7
    assert parse_bytes(None) is None
    for wrong in (0, -1, "much", "1..5GB", "", True):
        with pytest.raises(ValueError, match="max_memory"):
            CollectSettings(max_memory=wrong)


@pytest.mark.parametrize(
    ("rows", "wanted"), [(8, [8, 4, 3, 2, 1]), (5, [5, 3, 2, 1]), (1, [1]), (2, [2, 1])]
)
def test_a_batch_is_cut_in_every_useful_number_of_parts(rows: int, wanted: list[int]) -> None:
    """Parts of eight rows in two, three, four and eight: of other numbers one part is as large as of these."""
    batch = {"input_ids": torch.zeros(rows, 6, dtype=torch.long)}
    for weights in (0, 7):  # of the largest weight that is fetched for a batch
        sizes = planner._batch_sizes([Batch(batch)], 10.0, weights)
        assert [size.rows or rows for size in sizes] == wanted
        assert [size.nbytes for size in sizes] == [60 * n + weights for n in wanted]


def test_what_is_handed_over_is_held_by_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass needs the memory of the statistics before it: they are gone when it begins."""
    model, modules = model_and_modules()
    most = max(sum(statistic_bytes(s, NEEDS).values()) for s in shapes_of(modules).values())
    prepared = planned(model, modules, batches(), NEEDS)
    plan = make_plan(shapes_of(modules), NEEDS, most)
    assert len(plan.passes) > 2
    before: list[weakref.ref[object]] = []
    alive: list[int] = []
    work = collecting.run_batches

    def spy(*args: object) -> object:
        alive.append(sum(kept() is not None for kept in before))
        return work(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(collecting, "run_batches", spy)
    for part in replace(prepared, plan=plan).parts():
        before.append(weakref.ref(part[part.names[0]]))
        del part
    assert alive == [0] * len(plan.passes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_added_up_in_bfloat16_take_half_the_bytes(dtype: torch.dtype) -> None:
    model, modules = model_and_modules()
    model.to(dtype)
    data = batches(count=5)
    options = {"max_memory": "1GiB", "gradient_dtype": "bfloat16"}
    wide = collected(model, modules, data, LORA_DA, max_memory="1GiB")
    narrow = collected(model, modules, data, LORA_DA, **options)
    assert planned(model, modules, data, LORA_DA, **options).plan.nbytes == narrow.nbytes
    assert narrow.metadata["gradient_dtype"] == "bfloat16"
    for name in wide:
        one, other = wide[name], narrow[name]
        assert one.gradient_sum is not None
        assert other.gradient_sum is not None
        assert other.gradient_sum.dtype == torch.bfloat16
        # Means are what they are of any sum; the moments do not change by a bit.
        assert other.gradient.dtype == torch.float32
        assert torch.equal(one.input_second_moment, other.input_second_moment)
        off = torch.linalg.norm(other.gradient - one.gradient) / torch.linalg.norm(one.gradient)
        assert 1e-4 < off < 5 * 2**-8
    assert wide.nbytes - narrow.nbytes == sum(
        layer.gradient_sum.numel() * (layer.gradient_sum.element_size() - 2)
        for layer in (wide[name] for name in wide)
        if layer.gradient_sum is not None
    )


def test_a_start_from_gradients_in_bfloat16_is_nearly_the_same(tmp_path: Path) -> None:
    """Rounding is noise in all directions, little of it in those looked for; files keep the dtype."""
    model, modules = model_and_modules()
    config = LoraConfig(r=2, target_modules="all-linear")
    data = batches(count=5)
    found = {
        dtype: lorainit.collect_statistics(
            model,
            config,
            data=data,
            needs=STATISTICS,
            gradient_dtype=dtype,  # type: ignore[arg-type]
            progress=False,
        )
        for dtype in ("float32", "bfloat16")
    }
    found["bfloat16"].save(tmp_path / "narrow.safetensors")
    again = lorainit.Statistics.load(tmp_path / "narrow.safetensors")
    method = lorainit.LoraGA()
    for name in modules:
        one, other = (
            method.solve(modules[name].weight, statistics[name], 2, 1.0)
            for statistics in (found["float32"], again)
        )
        assert again[name].gradient_sum.dtype == torch.bfloat16
        basis, near = (torch.linalg.qr(f.A.mT)[0] for f in (one, other))
        sine = torch.linalg.matrix_norm(near - basis @ (basis.mT @ near), 2)
        assert 0 < sine < 0.1


@pytest.mark.parametrize(
    ("needs", "warned"),
    [({"gradient"}, False), ({"gradient", "output_second_moment"}, False), (LORA_DA, True)],
    ids=["LoRA-GA", "outputs alone", "LoRA-DA"],
)
def test_rounding_that_a_method_makes_large_is_said(
    needs: set[str], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, modules = model_and_modules()
    for dtype in ("bfloat16", "float32"):
        caplog.clear()
        planned(model, modules, batches(), needs, gradient_dtype=dtype)
        assert ("divides it by the inputs'" in caplog.text) == (warned and dtype == "bfloat16")


def test_another_dtype_of_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient_dtype must be one of"):
        CollectSettings(gradient_dtype="float16")  # type: ignore[arg-type]


def test_a_start_adds_gradients_up_as_it_is_told(caplog: pytest.LogCaptureFixture) -> None:
    factors = {}
    for dtype in ("float32", "bfloat16"):
        model, _ = model_and_modules()
        wrapped = lorainit.get_peft_model(
            model,
            LoraConfig(r=2, target_modules="all-linear"),
            method=lorainit.LoraOne(),
            data=batches(count=5),
            gradient_dtype=dtype,  # type: ignore[arg-type]
            progress=False,
        )
        factors[dtype] = {n: p for n, p in wrapped.named_parameters() if "lora_B" in n}
    assert "divides it" not in caplog.text
    off = [
        torch.linalg.norm(b - factors["bfloat16"][name]) / torch.linalg.norm(b)
        for name, b in factors["float32"].items()
    ]
    assert all(0 < one < 0.2 for one in off)
