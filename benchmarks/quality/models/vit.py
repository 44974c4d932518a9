"""A small vision transformer, pretrained on half of 5,000 MNIST digits.

Its weights, rounded to bfloat16 as the benchmark rounds every base, stand beside this file: pretraining gives
other ones on every kind of machine. ``python -m benchmarks.quality.models.vit --out FOLDER`` trains another (a
minute or two on a core).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from benchmarks.quality.data.classification import mnist_half, pixels
from lorainit.models.pretrained import load_whole

EPOCHS, BATCH, RATE = 30, 50, 2e-3


def vit_config() -> ViTConfig:
    """28 x 28 grey pixels in 49 patches; 4 layers of width 64."""
    return ViTConfig(
        image_size=28,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )


KEPT = Path(__file__).parent / "vit-mnist"
"""The weights that records are made with."""


def load_vit(folder: Path | None = None, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The pretrained model in float32 and eval mode, from a folder or as it is kept."""
    path = str(folder or KEPT)
    model: PreTrainedModel = load_whole(ViTForImageClassification, path, dtype=torch.float32)
    return model.to(device).eval()


def pretrain(folder: Path, device: torch.device | str = "cpu", epochs: int = EPOCHS) -> float:
    """Train from scratch, with shifts of up to two pixels; returns the accuracy on the other half."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(vit_config()).to(device).train()
        images, labels = (torch.from_numpy(x).to(device) for x in mnist_half(0))
        steps = epochs * (len(labels) // BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
        for _ in range(epochs):
            order = torch.randperm(len(labels), device=device)
            for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
                x = pixels(images[rows])
                down, right = torch.randint(-2, 3, (2,)).tolist()
                x = F.pad(x, (2, 2, 2, 2), value=-1.0)[
                    :, :, 2 + down : 30 + down, 2 + right : 30 + right
                ]
                loss = F.cross_entropy(model(pixel_values=x).logits, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
    model.eval()
    with torch.no_grad():
        held, classes = (torch.from_numpy(x).to(device) for x in mnist_half(1))
        right = model(pixel_values=pixels(held)).logits.argmax(-1) == classes
    model.save_pretrained(folder)
    return float(right.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{out}: {100 * pretrain(out, device):.1f}% right on digits it has not seen")


if __name__ == "__main__":
    main()
