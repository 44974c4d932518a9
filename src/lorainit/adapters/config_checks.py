"""A LoraConfig's numbers and patterns, checked before anything is matched or created."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft import LoraConfig

from lorainit.errors import AdapterError, RankError, TargetError
from lorainit.types.numbers import require_count, require_number


def check_config(config: LoraConfig) -> None:
    """Raise unless every rank, alpha and rate is one, and every pattern can be read.

    Raises:
        RankError: a rank that is no whole number of at least one.
        AdapterError: an alpha that is not finite and positive, or a dropout outside ``[0, 1)``.
        TargetError: a regular expression that is none.
    """
    require_count("r", config.r, error=RankError)
    require_number("lora_alpha", config.lora_alpha, inclusive=False, error=AdapterError)
    require_number("lora_dropout", config.lora_dropout, below=1.0, error=AdapterError)
    for key, rank in _entries(config, "rank_pattern"):
        require_count(f"rank_pattern['{key}']", rank, error=RankError)
    for key, alpha in _entries(config, "alpha_pattern"):
        require_number(f"alpha_pattern['{key}']", alpha, inclusive=False, error=AdapterError)
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field, None)
        if isinstance(pattern, str):
            _check_pattern(field, pattern)
    for field in ("rank_pattern", "alpha_pattern"):
        for key, _ in _entries(config, field):
            _check_pattern(field, key)


def _entries(config: LoraConfig, field: str) -> Iterable[tuple[str, object]]:
    table = getattr(config, field, None) or {}
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise AdapterError(f"{field} must be a dictionary of names to numbers.")
    return list(table.items())


def _check_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise TargetError(
            f"{field} {pattern[:80]!r} is no regular expression ({error}). Write names with commas "
            "between them, or escape its special characters."
        ) from None
