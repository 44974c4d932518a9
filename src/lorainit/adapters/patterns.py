"""Rank and alpha of single layers in a LoraConfig, with one global scaling for all."""

from __future__ import annotations

import re
from collections.abc import Mapping

from peft import LoraConfig


def exact_pattern(name: str) -> str:
    """A pattern key that matches this one module and no other."""
    return "^" + re.escape(name)


def alpha_for(config: LoraConfig, rank: int) -> float:
    """The alpha by which a layer of this rank has the configuration's global scaling."""
    ratio = rank / config.r
    alpha = config.lora_alpha * (ratio**0.5 if config.use_rslora else ratio)
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def with_ranks(config: LoraConfig, ranks: Mapping[str, int]) -> None:
    """Give single layers their own rank, in place, at the configuration's global scaling."""
    for name, rank in ranks.items():
        pin_layer(config, name, rank, alpha_for(config, rank))


def pin_layer(config: LoraConfig, name: str, rank: int, alpha: float) -> None:
    """Give one layer its rank and alpha, in place, before any broader pattern matches it."""
    key = exact_pattern(name)
    config.rank_pattern = {key: rank} | {k: v for k, v in config.rank_pattern.items() if k != key}
    config.alpha_pattern = {key: alpha} | {
        k: v for k, v in config.alpha_pattern.items() if k != key
    }


def scale_ranks(config: LoraConfig, factor: float) -> None:
    """Multiply every rank, and alpha so that no scaling changes, in place."""
    alpha_factor = factor**0.5 if config.use_rslora else factor

    def scaled(alpha: float) -> float:
        value = alpha * alpha_factor
        return round(value) if abs(value - round(value)) < 1e-9 else value

    config.r = round(config.r * factor)
    config.lora_alpha = scaled(config.lora_alpha)
    config.rank_pattern = {k: round(v * factor) for k, v in config.rank_pattern.items()}
    config.alpha_pattern = {k: scaled(v) for k, v in config.alpha_pattern.items()}
