"""Whole models: a U-Net, a Whisper and a language model with new words, of which nothing is left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import lorainit
from tests.adapters import tiny
from tests.statistics import models

METHODS = {"displaced": lorainit.LoraDA(), "anchored": lorainit.FILet()}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def moved(model: nn.Module) -> nn.Module:
    """Every trainable parameter a little further."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def layers(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


# --- a U-Net ------------------------------------------------------------------------------------


def unet() -> Any:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
        ).eval()


def latents(sizes: tuple[int, ...] = (4, 4)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "sample": torch.randn(n, 4, 8, 8, generator=generator),
            "timestep": torch.randint(0, 1000, (n,), generator=generator),
            "states": torch.randn(n, 6, 16, generator=generator),
            "noise": torch.randn(n, 4, 8, 8, generator=generator),
        }
        for n in sizes
    ]


def noise_of(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = model(batch["sample"], batch["timestep"], batch["states"]).sample
    return found


def squared_error(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return (noise_of(model, batch) - batch["noise"]).square().mean((1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(METHODS))
@pytest.mark.parametrize("own", [False, True], ids=["PeftModel", "its own adapter"])
def test_unet(kind: str, own: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Started whole; what is saved is loaded by stock PEFT, or by diffusers where the adapter is its own."""
    model, batch = unet(), latents()[0]
    config = LoraConfig(r=4, target_modules=layers(model, nn.Linear, nn.Conv2d))
    before = noise_of(model, batch)
    if own:
        model.add_adapter(config)
    with caplog.at_level("INFO", logger="lorainit"):
        started: Any = lorainit.get_peft_model(
            model,
            None if own else config,
            method=METHODS[kind],
            data=latents(),
            loss_fn=squared_error,
            progress=False,
        )
    assert "83 layers started" in caplog.text
    assert "Left at PEFT's start" not in caplog.text
    assert torch.equal(noise_of(started, batch), before) == (kind == "anchored")
    wanted = noise_of(moved(started), batch)
    again = unet()
    if own:
        started.save_lora_adapter(tmp_path)
        again.load_lora_adapter(
            tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors"
        )
    else:
        started.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(again, tmp_path)
    torch.testing.assert_close(noise_of(again.eval(), batch), wanted, **CLOSE)


def started_and_reloaded(
    model: Any,
    fresh: Any,
    targets: list[str],
    method: Any,
    rank: int,
    batch: dict[str, Tensor],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> Tensor:
    """Every target is started, and stock PEFT loads what is saved onto `fresh`; the logits at the start."""
    with caplog.at_level("INFO", logger="lorainit"):
        started = lorainit.get_peft_model(
            model,
            LoraConfig(r=rank, target_modules=targets),
            method=method,
            data=[batch],
            progress=False,
        )
    assert f"{len(targets)} layers started" in caplog.text
    assert "Left at PEFT's start" not in caplog.text
    first: Tensor = started(**batch).logits.detach()
    wanted = moved(started)(**batch).logits.detach()
    started.save_pretrained(folder)
    again = PeftModel.from_pretrained(fresh, folder)
    torch.testing.assert_close(again(**batch).logits, wanted, **CLOSE)
    return first


# --- sound --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(METHODS))
def test_whisper(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its linear layers and, where the method needs no anchor, its words.

    Its own forward reads a convolution's stride, which PEFT's layer around one does not have: no adapter of
    these two runs, a start or not.
    """
    model = models.whisper()
    targets = layers(model, nn.Linear)
    if kind == "displaced":
        targets.append("model.decoder.embed_tokens")
    labels = torch.randint(3, models.VOCABULARY, (4, 6))
    batch = {"input_features": torch.randn(4, 8, 20), "labels": labels}
    before = model(**batch).logits.detach()
    fresh = models.whisper()
    first = started_and_reloaded(model, fresh, targets, METHODS[kind], 2, batch, tmp_path, caplog)
    assert torch.equal(first, before) == (kind == "anchored")


def test_a_network_of_sound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of wav2vec2 but its grouped convolution, whose weight is computed anew in every forward."""
    model = models.wav2vec2()
    targets = layers(model, nn.Linear, nn.Conv1d)
    targets = [n for n in targets if "pos_conv" not in n]
    assert any("feature_extractor" in n for n in targets)
    batch = {"input_values": torch.randn(3, 64), "labels": torch.tensor([0, 2, 1])}
    fresh = models.wav2vec2()
    started_and_reloaded(model, fresh, targets, lorainit.LoraDA(), 2, batch, tmp_path, caplog)


# --- words --------------------------------------------------------------------------------------


def with_new_words() -> Any:
    model = tiny.llama()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model.resize_token_embeddings(tiny.VOCABULARY + 3, mean_resizing=False)
    return model


def test_a_language_model_with_new_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batch = tiny.batch()
    batch["input_ids"][:, 1] = batch["labels"][:, 1] = tiny.VOCABULARY + 1
    model = with_new_words()
    targets = layers(model, nn.Linear, nn.Embedding)
    fresh = with_new_words()
    started_and_reloaded(model, fresh, targets, lorainit.LoraDA(), 4, batch, tmp_path, caplog)
