"""Rows of images and of sound, for models that read nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks.architectures.tiny.text import tokens

Row = dict[str, Any]
ROWS = 8
_SAMPLES = (2400, 2000, 2800, 1700, 2200, 2600, 1900, 2500)
_FRAMES = (60, 48, 72, 40, 56, 64, 44, 68)
_MELS = (
    "feature_projection_input_dim",
    "num_mel_bins",
    "input_feat_per_channel",
    "input_dim",
    "mel_bins",
)


def image_size(config: Any, default: int) -> tuple[int, int]:
    """Height and width that a model's configuration names."""
    inner = (getattr(config, key, None) for key in ("vision_config", "backbone_config"))
    for part in (config, *inner):
        size = getattr(part, "image_size", None)
        if isinstance(size, dict):
            size = (size.get("height"), size.get("width"))
        if isinstance(size, list | tuple):
            return (size[-2], size[-1]) if len(size) >= 2 else (size[0], size[0])
        if isinstance(size, int):
            return (size, size)
    return (default, default)


def image_rows(name: str, config: Any, generator: Generator) -> list[Row]:
    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    size, channels = image_size(config, 64), getattr(config, "num_channels", 3) or 3
    rows = []
    for i in range(ROWS):
        if name == "imagegpt":
            ids = torch.randint(0, config.vocab_size - 1, (1, 16), generator=generator)
            row: Row = {"input_ids": ids}
        elif name == "siglip2":
            row = {
                "pixel_values": noise(1, 16, 3 * config.vision_config.patch_size**2),
                "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
                "spatial_shapes": torch.tensor([[4, 4]]),
            }
        elif name == "perceiver":
            row = {"inputs": noise(1, 3, 64, 64)}
        else:
            row = {"pixel_values": noise(1, channels, *size)}
        rows.append(row | {"labels": torch.tensor([i % 2])})
    return rows


def sound_rows(
    name: str, config: Any, arguments: tuple[str, ...], generator: Generator, *, transcripts: bool
) -> list[Row]:
    """Sound with a transcript (CTC), or with a class."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = []
    for i in range(ROWS):
        if name == "audio-spectrogram-transformer":
            row: Row = {"input_values": noise(1, config.max_length, config.num_mel_bins)}
        elif name == "whisper":
            row = {"input_features": noise(1, config.num_mel_bins, 2 * config.max_source_positions)}
        elif "input_values" in arguments:
            row = {"input_values": noise(1, _SAMPLES[i])}
        else:
            row = {"input_features": noise(1, _FRAMES[i], _mels(config))}
        if "attention_mask" in arguments and name != "whisper":
            row["attention_mask"] = _ones(row)
        last = min(getattr(config, "vocab_size", None) or 20, 30)
        transcript = torch.randint(3, last, (1, 2 + i % 2), generator=generator)
        rows.append(row | {"labels": transcript if transcripts else torch.tensor([i % 2])})
    return rows


def speech_rows(
    name: str, config: Any, arguments: tuple[str, ...], generator: Generator
) -> list[Row]:
    """Sound with the text that a decoder makes of it."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = []
    for i in range(ROWS):
        frames = _FRAMES[i] // 2
        labels = tokens(generator, 3 + i % 4, min(90, getattr(config, "vocab_size", None) or 90))
        if name == "whisper":
            row: Row = {
                "input_features": noise(1, config.num_mel_bins, 2 * config.max_source_positions)
            }
        elif name == "speech_to_text":
            mels = config.input_feat_per_channel * config.input_channels
            row = {"input_features": noise(1, frames, mels)}
        elif name in ("seamless_m4t", "seamless_m4t_v2"):
            row = {"input_features": noise(1, frames, config.feature_projection_input_dim)}
        elif "input_values" in arguments and "input_ids" not in arguments:
            row = {"input_values": noise(1, _SAMPLES[i])}
        elif "inputs" in arguments:
            row = {"inputs": noise(1, _SAMPLES[i])}
        elif "input_features" in arguments and "input_ids" not in arguments:
            row = {"input_features": noise(1, _FRAMES[i], _mels(config))}
        else:
            ids = tokens(generator, 8)
            row, labels = {"input_ids": ids}, ids.clone()
        if "attention_mask" in arguments and name != "whisper" and "inputs" not in row:
            row["attention_mask"] = _ones(row)
        rows.append(row | {"labels": labels})
    return rows


def _ones(row: Row) -> Tensor:
    """A mask of a row's only tensor."""
    (value,) = row.values()
    return torch.ones(value.shape[:2], dtype=torch.long)


def _mels(config: Any) -> int:
    part = getattr(config, "encoder_config", config)
    return next((int(n) for key in _MELS if (n := getattr(part, key, None))), 80)
