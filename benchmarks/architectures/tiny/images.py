"""What an image or a sound can look like to a model that reads text too: forms to try, by its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks.architectures.tiny.senses import image_size

Row = dict[str, Any]
Form = Callable[[int], Row]
"""The tensors of the image of row `i`."""


def forms(config: Any, arguments: tuple[str, ...], generator: Generator) -> Iterator[Form]:
    """Forms to try one after the other, those that an argument points to first."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    vision = getattr(config, "vision_config", None)
    size = image_size(vision, 32) if vision is not None else image_size(config, 32)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3) or 3
    patch = getattr(vision, "patch_size", 8)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    if "image_grid_thw" in arguments:
        yield from _grids(vision, channels, patch, noise)
    if "image_sizes" in arguments:
        for tiles, scale in (((), 1), ((3,), 1), ((5,), 2), ((1,), 1)):
            yield lambda i, t=tiles, s=scale: {
                "pixel_values": noise(1, *t, 3, *size),
                "image_sizes": torch.tensor([[s * size[0], s * size[1]]]),
            }
    if "spatial_shapes" in arguments:
        yield lambda i: {
            "pixel_values": noise(1, 16, channels * patch * patch),
            "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        }
    for key in ("image_position_ids", "pixel_position_ids"):
        if key in arguments:
            place = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
            yield lambda i, k=key, p=place: {
                "pixel_values": noise(1, 36, channels * patch * patch),
                k: torch.stack(p, -1).reshape(1, 36, 2),
            }
    if "qformer_input_ids" in arguments:
        for frames in ((), (4,)):
            yield lambda i, f=frames: {
                "pixel_values": noise(1, *f, 3, *size),
                "qformer_input_ids": torch.randint(12, 90, (1, 4), generator=generator),
            }
    if "aspect_ratio_ids" in arguments:
        yield lambda i: {
            "pixel_values": noise(1, 1, 4, 3, *size),
            "aspect_ratio_ids": torch.tensor([[6]]),
            "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
        }
    if "pixel_values" in arguments:
        for images in ((), (1,), (1, 1)):
            yield lambda i, n=images: {"pixel_values": noise(1, *n, 3, *size)}
    if "pixel_values_images" in arguments:
        yield lambda i: {"pixel_values_images": noise(1, 3, *size)}
    if "high_res_pixel_values" in arguments:
        high = image_size(getattr(config, "high_res_vision_config", None), size[0])
        yield lambda i: {
            "pixel_values": noise(1, 3, *size),
            "high_res_pixel_values": noise(1, 3, *high),
        }
    if "flattened_patches" in arguments:
        yield lambda i: {"flattened_patches": _patches(vision, noise)}
    if "input_features" in arguments:
        yield from _sounds(config, arguments, noise)


def _grids(vision: Any, channels: int, patch: int, noise: Callable[..., Tensor]) -> Iterator[Form]:
    """Patches of images of two sizes, with their grids."""

    def form(*values: int) -> Form:
        def of(i: int) -> Row:
            wide = 4 if i % 2 else 8
            return {
                "pixel_values": noise(4 * wide, *values),
                "image_grid_thw": torch.tensor([[1, 4, wide]]),
            }

        return of

    frames = getattr(vision, "temporal_patch_size", 1) or 1
    yield form(channels * frames * patch * patch)
    if frames > 1:
        yield form(channels * patch * patch)
    yield form(channels, patch, patch)


def _patches(vision: Any, noise: Callable[..., Tensor]) -> Tensor:
    """Twelve patches, each with its row and column in front."""
    place = torch.arange(12)
    where = torch.stack([place % 4 + 1, place // 4 + 1], 1).float().unsqueeze(0)
    width = getattr(vision, "patch_embed_hidden_size", 768)
    return torch.cat([where, noise(1, 12, width)], -1)


def _sounds(
    config: Any, arguments: tuple[str, ...], noise: Callable[..., Tensor]
) -> Iterator[Form]:
    parts = (getattr(config, key, None) for key in ("audio_config", "encoder_config"))
    part = next((p for p in parts if p is not None), config)
    most = getattr(part, "max_source_positions", None)
    frames = 2 * (most or getattr(part, "max_position_embeddings", None) or 64)
    mels = getattr(part, "num_mel_bins", None) or 80
    for key in ("feature_attention_mask", "input_features_mask"):
        if key in arguments:
            yield lambda i, k=key: {
                "input_features": noise(1, mels, frames),
                k: torch.ones(1, frames, dtype=torch.long),
            }
    yield lambda i: {"input_features": noise(1, mels, frames)}
    yield lambda i: {"input_features": noise(1, 30, getattr(part, "input_dim", 160))}
