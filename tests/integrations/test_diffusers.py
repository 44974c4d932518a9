"""diffusers: a U-Net and a transformer with adapters of their own, started, saved and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft.utils import get_peft_model_state_dict
from torch import Tensor

import lorainit
from tests.adapters import tiny
from tests.trainers.singles import Recording, distance

pytest.importorskip("diffusers")
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore")


def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def flux() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def config() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"])


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_unet(seed: int, rows: int = 4) -> dict[str, Tensor]:
    return {
        "sample": noise(rows, 4, 8, 8, seed=seed),
        "timestep": torch.arange(rows) * 200 + seed,
        "encoder_hidden_states": noise(rows, 5, 16, seed=seed + 100),
        "target": noise(rows, 4, 8, 8, seed=seed + 200),
    }


def of_flux(seed: int, rows: int = 4) -> dict[str, Tensor]:
    """Its first tensor counts tokens, not rows."""
    return {
        "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.zeros(16, 3),
        "hidden_states": noise(rows, 16, 4, seed=seed),
        "encoder_hidden_states": noise(rows, 5, 16, seed=seed + 100),
        "pooled_projections": noise(rows, 16, seed=seed + 200),
        "timestep": torch.linspace(0.1, 0.9, rows),
        "target": noise(rows, 16, 4, seed=seed + 300),
    }


def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "target"}
    error = F.mse_loss(model(**inputs).sample, batch["target"], reduction="none")
    return error.flatten(1).mean(1)


def single(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {k: v if k in ("txt_ids", "img_ids") else v[row : row + 1] for k, v in batch.items()}


CASES = {
    "unet": (unet, of_unet, StableDiffusionLoraLoaderMixin, "unet"),
    "flux": (flux, of_flux, FluxLoraLoaderMixin, "transformer"),
}


def start(model: Any, method: Any, data: list[Any]) -> Any:
    return lorainit.get_peft_model(
        model, None, method=method, data=data, loss_fn=loss, progress=False
    )


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_single_images(name: str) -> None:
    build, batch_of, *_ = CASES[name]
    batches = [batch_of(seed) for seed in range(3)]
    rows = [single(batch, row) for batch in batches for row in range(4)]
    found = []
    for data in (batches, rows, rows[1:]):
        model = build()
        model.add_adapter(config())
        found.append(Recording())
        start(model, found[-1], data)
    assert distance(found[0], found[1]) < 1e-5
    assert distance(found[0], found[2]) > 1e-3


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
@pytest.mark.parametrize("name", CASES)
def test_saved_weights_load_into_a_fresh_model(name: str, kind: str, tmp_path: Path) -> None:
    build, batch_of, mixin, part = CASES[name]
    model = build()
    model.add_adapter(config())
    start(model, tiny.METHODS[kind], [batch_of(seed) for seed in range(3)])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for seed in range(3):
        loss(model, batch_of(seed)).mean().backward()
        optimizer.step()
    mixin.save_lora_weights(
        tmp_path,
        **{f"{part}_lora_layers": get_peft_model_state_dict(model)},
        **_collate_lora_metadata({part: model}),
    )
    inputs = {k: v for k, v in batch_of(9).items() if k != "target"}
    fresh = build()
    with torch.no_grad():
        live, base = model(**inputs).sample, fresh(**inputs).sample
        state, *rest = mixin.lora_state_dict(tmp_path, return_lora_metadata=True)
        fresh.load_lora_adapter(state, prefix=part, metadata=rest[-1])
        loaded = fresh(**inputs).sample
    torch.testing.assert_close(loaded, live, rtol=1e-5, atol=2e-6)
    assert float((live - base).abs().max()) > 1e-4
