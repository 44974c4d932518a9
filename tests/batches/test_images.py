"""Two real shapes of images: patches of any image by a grid, and several images a row, ragged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig
from torch import Tensor, nn

from lorainit.data.batch import Batch
from lorainit.statistics.positions.counted import positions_of
from tests.batches.same import collected, difference, start_difference, started

Row = dict[str, Tensor]
IMAGE = 50
TEXT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


def _made(build: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double().eval()


def qwen2_vl() -> Any:
    """Images of any size: all patches in one tensor, told apart by ``image_grid_thw``."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = hf.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 2,
            "temporal_patch_size": 1,
            "in_channels": 3,
        },
        image_token_id=IMAGE,
        video_token_id=51,
        vision_start_token_id=52,
        vision_end_token_id=53,
    )
    return _made(lambda: hf.Qwen2VLForConditionalGeneration(config))


def llava() -> Any:
    """All images in one tensor, some rows having more than others: four tokens an image."""
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            projection_dim=16,
        ),
        image_token_id=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return _made(lambda: hf.LlavaForConditionalGeneration(config))


def _row(ids: list[int], **images: Tensor) -> Row:
    tokens = torch.tensor([ids])
    labels = tokens.masked_fill(tokens == IMAGE, -100)
    return {"input_ids": tokens, "labels": labels, **images}


def by_grid(count: int) -> list[Row]:
    """Rows of one image each, of three sizes, with text of other lengths; two have two."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(count):
        grids = [[1, 4, 4 + 2 * (index % 3)]]
        if index % 5 == 2:
            grids.append([1, 2, 4])
        patches = [t * h * w for t, h, w in grids]
        words = torch.randint(3, 45, (5 + index % 4,), generator=generator).tolist()
        ids = words[:1]
        for number in patches:
            ids += [52, *[IMAGE] * (number // 4), 53]
        row = _row(
            [*ids, *words[1:]],
            pixel_values=torch.randn(sum(patches), 12, generator=generator, dtype=torch.float64),
            image_grid_thw=torch.tensor(grids),
        )
        row["mm_token_type_ids"] = (row["input_ids"] == IMAGE).long()
        rows.append(row)
    return rows


def several(count: int) -> list[Row]:
    """Rows of one, two or three images."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for index in range(count):
        number = 1 + index % 3
        words = torch.randint(3, 45, (5 + index % 4,), generator=generator).tolist()
        ids = words[:2]
        for _ in range(number):
            ids += [IMAGE] * 4 + words[:1]
        pixels = torch.randn(number, 3, 8, 8, generator=generator, dtype=torch.float64)
        rows.append(_row([*ids, *words[2:]], pixel_values=pixels))
    return rows


SHAPES = {"patches by grid": (qwen2_vl, by_grid), "images per row": (llava, several)}


def together(rows: list[Row]) -> Row:
    """One padded batch."""
    # More than any row's patches, so that no mask fits the patches by its shape alone.
    length = 41
    assert length > max(row["input_ids"].shape[1] for row in rows)
    found: Row = {}
    for key, fill in (("input_ids", 0), ("labels", -100), ("mm_token_type_ids", 0)):
        if key in rows[0]:
            parts = [
                torch.nn.functional.pad(r[key], (0, length - r[key].shape[1]), value=fill)
                for r in rows
            ]
            found[key] = torch.cat(parts)
    found["attention_mask"] = torch.cat(
        [(torch.arange(length) < row["input_ids"].shape[1]).long()[None] for row in rows]
    )
    for key in ("pixel_values", "image_grid_thw"):
        if key in rows[0]:
            found[key] = torch.cat([row[key] for row in rows])
    return found


def grouped(rows: list[Row], sizes: tuple[int, ...]) -> list[Row]:
    found, first = [], 0
    for size in sizes:
        found.append(together(rows[first : first + size]))
        first += size
    assert first == len(rows)
    return found


def config() -> LoraConfig:
    return LoraConfig(r=2, target_modules=r".*(q_proj|down_proj|up_proj|fc1|fc2|qkv|linear_1)")


@pytest.mark.parametrize("shape", SHAPES)
class TestBatchesOfSeveral:
    def test_statistics(self, shape: str) -> None:
        build, make = SHAPES[shape]
        rows = make(15)
        single = collected(build(), rows, config=config())
        found = collected(build(), grouped(rows, (4, 6, 5)), config=config())
        assert difference(found, single) < 1e-5
        assert found.metadata["sequences"] == 15
        other = collected(build(), rows[:14], config=config())
        assert difference(other, single) > 1e-3

    @pytest.mark.parametrize("cap", [5, 12])
    def test_a_cap_inside_a_batch(self, shape: str, cap: int) -> None:
        build, make = SHAPES[shape]
        rows = make(15)
        found = collected(build(), grouped(rows, (4, 6, 5)), config=config(), max_sequences=cap)
        assert found.metadata["sequences"] == cap
        assert difference(found, collected(build(), rows[:cap], config=config())) < 1e-5

    def test_memory(self, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Cut to two rows a batch, whatever the plan would say."""
        from lorainit.statistics import collection

        build, make = SHAPES[shape]
        rows = make(6)
        whole = collection.run_batches
        sizes: list[Any] = []

        def cut(subject: Any, batches: Any, rows: Any) -> Any:
            sizes.extend(part.rows for batch in batches for part in batch.cut(2))
            return whole(subject, batches, 2)

        single = collected(build(), rows, config=config())
        monkeypatch.setattr(collection, "run_batches", cut)
        found = collected(build(), grouped(rows, (6,)), config=config())
        assert sizes == [2, 2, 2]
        assert difference(found, single) < 1e-5

    def test_the_start_with_its_held_back_share(self, shape: str) -> None:
        build, make = SHAPES[shape]
        rows = make(15)
        single = started(build, rows, config=config())
        found = started(build, grouped(rows, (4, 6, 5)), config=config())
        assert start_difference(found, single) < 1e-5
        tight = started(build, grouped(rows, (4, 6, 5)), config=config(), max_memory="1GiB")
        assert start_difference(tight, single) < 1e-5

    def test_images_follow_their_rows(self, shape: str) -> None:
        build, make = SHAPES[shape]
        rows = make(6)
        batch = Batch.arrived(together(rows), 0, build().config)
        assert batch.units == 6
        (part,) = batch.take([False, True, True, False, False, True])
        for key in ("pixel_values", "image_grid_thw"):
            if key in rows[0]:
                wanted = torch.cat([rows[i][key] for i in (1, 2, 5)])
                assert torch.equal(part.content[key], wanted)
        # The negative control: where nothing tells the token, nothing is cut.
        blind = Batch.arrived(together(rows), 0, None)
        assert blind.units == 1
        assert blind.cut(1) == [blind]


def test_a_text_as_long_as_its_images_have_patches() -> None:
    """Two rows of 20 tokens, 40 patches: the text's mask fits the patches by its shape alone."""
    rows = by_grid(2)
    batch = together(rows)
    for key in ("input_ids", "labels", "mm_token_type_ids", "attention_mask"):
        batch[key] = batch[key][:, :20]
    mask, patches = batch["attention_mask"], len(batch["pixel_values"])
    assert mask.numel() == patches == 40
    tokens = int(mask.sum())
    assert tokens < 40
    found = collected(qwen2_vl(), [batch], config=config())
    assert difference(found, collected(qwen2_vl(), rows, config=config())) < 1e-5
    visual = next(name for name in found.names if "visual" in name)
    textual = next(name for name in found.names if "language_model" in name)
    assert (found[visual].positions, found[textual].positions) == (40, tokens)
    # The negative control: what shape alone would take of the patches.
    assert positions_of(mask, mask.device).indices_for(torch.Size((patches,)))[1]


def test_whole_batches_are_held_back_where_images_cannot_be_told() -> None:
    """A model whose configuration names no token of images."""

    def build() -> Any:
        model = llava()

        class Hidden(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = model

            def forward(self, **batch: Any) -> Any:
                return self.inner(**batch)

        return Hidden()

    rows = several(20)
    batches = grouped(rows, (4,) * 5)
    found = started(build, batches, config=config())
    assert all(bool(torch.isfinite(x).all()) for x in found.values())
    kept = collected(build(), batches, config=config(), max_sequences=9)
    assert kept.metadata["sequences"] == 8


@pytest.mark.parametrize("count", [2, 3, 4])
def test_positions_of_three_axes(count: int) -> None:
    """``position_ids`` ``(3, B, T)``, also with three rows: as if each row ran alone."""
    rows = by_grid(2 * count)
    model = qwen2_vl()

    def with_positions(row: Row) -> Row:
        batch = dict(row)
        ids, _ = model.model.get_rope_index(
            batch["input_ids"],
            mm_token_type_ids=batch["mm_token_type_ids"],
            image_grid_thw=batch["image_grid_thw"],
            attention_mask=batch.get("attention_mask"),
        )
        return batch | {"position_ids": ids}

    single = collected(model, [with_positions(row) for row in rows], config=config())
    data = [with_positions(b) for b in grouped(rows, (count, count))]
    assert data[0]["position_ids"].shape[:2] == (3, count)
    assert difference(collected(model, data, config=config()), single) < 1e-5
    capped = collected(model, data, config=config(), max_sequences=count + 1)
    truth = collected(model, [with_positions(r) for r in rows[: count + 1]], config=config())
    assert difference(capped, truth) < 1e-5
