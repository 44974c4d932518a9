"""One experiment, as a small record whose content is its name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import lorainit

LEARNING_RATES: tuple[float, ...] = (1e-4, 2.5e-4, 6.3e-4, 1.6e-3, 4e-3, 1e-2)
"""The grid of every method: two decades, five per two decades and both ends."""

GRID: tuple[float, ...] = (2e-5, 5e-5, 1e-4, 2e-4, 4.5e-4, 1e-3, 2.2e-3, 4.6e-3, 1e-2)
"""Rates of the stage "grid", at which every line runs in full: two fifths of a decade apart, with the 1e-4
and 2e-4 that papers fix."""

FULL = "full"
"""Full fine-tuning, the upper line: no adapter, every weight of the base is trained."""

FULL_RATES: tuple[float, ...] = (1e-5, 2.5e-5, 6.3e-5, 1.6e-4, 4e-4, 1e-3)
"""Its own grid: whole weights want smaller steps."""

CURVE_PERCENT: tuple[int, ...] = (0, 1, 2, 5, 10, 25, 50, 100)
"""Where the issue's tables read the held-out loss, in percent of the steps."""


@dataclass(frozen=True)
class Experiment:
    """What is trained, how, and on how much.

    Attributes:
        task: name in a list of tasks of ``benchmarks.quality.models.registry``.
        method: name in ``lorainit.METHODS``, or ``"full"``.
        settings: keyword arguments of the method, JSON values; ``{"paper": true}`` stands for
            ``Method.paper()``, ``{"reference": true}`` for ``reference_weights`` of a quantized base, and
            ``{"matched": true}`` for a start that is told its learning rate, ``{"fitted": true}``, ``false`` or
            a part of the way for a new head that is or is not fitted first.
        learning_rate: the peak of the schedule.
        seed: draws the training samples, their order and the random starts.
        rank: of the adapter.
        alpha: ``lora_alpha``.
        rslora: scaling ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
        steps: of the optimizer.
        batch_size: sequences a step.
        train_samples: distinct training sequences; they repeat, reshuffled, when steps need more.
        statistics_samples: the first so many of them are what the method may see.
        model: the base model; ``NAME+GRID`` is the base ``NAME`` quantized.
        precision: of base weights and activations in training; adapters and optimizer are float32.
        warmup: share of the steps over which the rate rises from zero; a cosine to zero follows.
        clip: largest norm of the gradient, over all adapter weights together.
        style: of the prompt, ``"plain"`` or ``"chat"``; the prepared data must be of this style.
        init: ``"statistics"``: from statistics shared with other methods; ``"data"``: the method
            gets the batches themselves (refinement, calibration); ``"auto"`` decides by settings.
    """

    task: str
    method: str
    learning_rate: float
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    rank: int = 8
    alpha: float = 16
    rslora: bool = True
    steps: int = 128
    batch_size: int = 32
    train_samples: int = 4096
    statistics_samples: int = 256
    model: str = "smollm2-135m-instruct"
    precision: str = "bf16"
    warmup: float = 0.03
    clip: float = 1.0
    init: str = "auto"
    style: str = "plain"

    def __post_init__(self) -> None:
        if self.method not in lorainit.METHODS and self.method != FULL:
            known = ", ".join(lorainit.METHODS)
            raise ValueError(f"no method is called '{self.method}' (there are: {known})")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32, got {self.precision!r}")

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits of the content's SHA-256."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """The method with its settings: what one line of a table is about."""
        if not self.settings:
            return self.method
        inside = ",".join(f"{k}={v}" for k, v in sorted(self.settings.items()))
        return f"{self.method}({inside})"

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Experiment:
        return cls(**values)

    def at(self, **changes: Any) -> Experiment:
        return replace(self, **changes)

    def build_method(self) -> Any:
        """The method object; one that asks how many samples will be trained on is told."""
        settings = dict(self.settings)
        kind = lorainit.METHODS[self.method]
        for name in ("reference", "matched", "fitted"):
            settings.pop(name, None)
        paper = settings.pop("paper", False)
        method = replace(kind.paper(), **settings) if paper else kind(**settings)  # type: ignore[attr-defined]
        if getattr(method, "population", 0) is None:
            method = replace(method, population=float(self.train_samples))
        return method

    def wants_data(self, method: Any) -> bool:
        """Whether the method must see batches: for a length found by search, or for refinement."""
        if self.init != "auto":
            return self.init == "data"
        return bool(getattr(method, "calibrated", False)) or getattr(method, "steps", 1) > 1


def percent_steps(steps: int) -> list[int]:
    """The steps of `CURVE_PERCENT`."""
    return sorted({-(-steps * p // 100) for p in CURVE_PERCENT})


def curve_steps(steps: int) -> list[int]:
    """Steps before which (and after the last of which) the held-out loss is taken.

    Those of `CURVE_PERCENT`, after the first step, dense in the first tenth, and every eighth of the way.
    """
    points = {1, *percent_steps(steps)}
    tenth = -(-steps // 10)
    points |= {round(tenth * i / 8) for i in range(9)}
    points |= {round(steps * i / 8) for i in range(1, 9)}
    points |= {round(steps * 3 / 16), round(steps * 5 / 16)}
    return sorted(points)
