"""diffusers: a U-Net with an adapter of its own, started from latents and text embeddings.

    python examples/diffusers_unet.py --model FOLDER --data batches.pt --out lora

The folder holds the U-Net ("unet" of a pipeline); the file a list of dictionaries with "latents"
``(rows, channels, height, width)`` and "text" ``(rows, tokens, width)``, made by the VAE and text encoder.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import lorainit

SCHEDULER = DDPMScheduler()


def noised(batch: dict[str, Any], seed: int) -> dict[str, Any]:
    """Noise and time steps are drawn once, so that every evaluation sees the same."""
    generator = torch.Generator().manual_seed(seed)
    latents = batch["latents"]
    noise = torch.randn(latents.shape, generator=generator)
    steps = torch.randint(
        0, SCHEDULER.config.num_train_timesteps, (len(latents),), generator=generator
    )
    sample = SCHEDULER.add_noise(latents, noise, steps)
    return {
        "sample": sample,
        "timestep": steps,
        "encoder_hidden_states": batch["text"],
        "noise": noise,
    }


def loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """One loss an image."""
    inputs = {key: value for key, value in batch.items() if key != "noise"}
    error = F.mse_loss(model(**inputs).sample, batch["noise"], reduction="none")
    return error.flatten(1).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-4)
    arguments = parser.parse_args()

    unet = UNet2DConditionModel.from_pretrained(arguments.model)
    unet.requires_grad_(False)
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(
        LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules=attention)
    )
    batches = torch.load(arguments.data)
    data = [noised(batch, seed) for seed, batch in enumerate(batches)]
    lorainit.get_peft_model(unet, None, method=lorainit.LoraDA(), data=data, loss_fn=loss)

    optimizer = torch.optim.AdamW(
        [p for p in unet.parameters() if p.requires_grad], lr=arguments.lr
    )
    for step in range(arguments.steps):
        mean = loss(unet, noised(batches[step % len(batches)], 1000 + step)).mean()
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {float(mean):.4f}")
    StableDiffusionPipeline.save_lora_weights(
        arguments.out,
        unet_lora_layers=get_peft_model_state_dict(unet),
        **_collate_lora_metadata({"unet": unet}),
    )


if __name__ == "__main__":
    main()
