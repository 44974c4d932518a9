"""Rank and alpha of single layers in a LoraConfig, with one global scaling for all."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from peft import LoraConfig
from peft.utils.other import get_pattern_key


def exact_pattern(name: str) -> str:
    """A pattern key that matches this one module and no other."""
    return "^" + re.escape(name)


def with_ranks(config: LoraConfig, ranks: Mapping[str, int], names: Iterable[str]) -> None:
    """Give single layers their own rank, in place, at the scaling that each of them has.

    Args:
        config: of the adapter.
        ranks: by module name.
        names: of every module that the configuration matches, these among them or not.
    """
    layers = {
        name: (
            int(_find(config.rank_pattern, name, config.r)),
            _find(config.alpha_pattern, name, config.lora_alpha),
        )
        for name in names
    }
    for name, rank in ranks.items():
        configured, alpha = layers.get(name, (config.r, config.lora_alpha))
        ratio = rank / configured
        layers[name] = (rank, scaled(alpha, ratio**0.5 if config.use_rslora else ratio))
    spell_out(config, layers)


def spell_out(config: LoraConfig, layers: Mapping[str, tuple[int, float]]) -> None:
    """Give every layer its rank and alpha by its own name, in place.

    No pattern that matches any of them is left beside: PEFT takes the first that matches, and sorts
    them by their letters when it saves.
    """
    ranks = {n: rank for n, (rank, _) in layers.items() if rank != config.r}
    alphas = {n: alpha for n, (_, alpha) in layers.items() if alpha != config.lora_alpha}
    config.rank_pattern = _exactly(ranks, config.rank_pattern, layers)
    config.alpha_pattern = _exactly(alphas, config.alpha_pattern, layers)


def _exactly(
    values: Mapping[str, float], old: Mapping[str, float], names: Collection[str]
) -> dict[str, float]:
    kept = {
        key: value
        for key, value in old.items()
        if not any(get_pattern_key([key], name) == key != name for name in names)
        and key not in names
    }
    return {exact_pattern(name): value for name, value in values.items()} | kept


def _find(pattern: Mapping[str, float], name: str, default: float) -> float:
    return pattern.get(get_pattern_key(list(pattern), name), default)


def scaled(alpha: float, factor: float) -> float:
    """An alpha times a factor, whole where it is whole but for rounding."""
    value = alpha * factor
    return round(value) if abs(value - round(value)) < 1e-9 else value


def scale_ranks(config: LoraConfig, factor: float) -> None:
    """Multiply every rank, and alpha so that no scaling changes, in place."""
    by = factor**0.5 if config.use_rslora else factor
    config.r = round(config.r * factor)
    config.lora_alpha = scaled(config.lora_alpha, by)
    config.rank_pattern = {k: round(v * factor) for k, v in config.rank_pattern.items()}
    config.alpha_pattern = {k: scaled(v, by) for k, v in config.alpha_pattern.items()}
