"""Auto: the default. Natural where it is worth it, plain LoRA where it is not."""

from __future__ import annotations

from dataclasses import dataclass

from lorainit.methods.natural import Natural


@dataclass(frozen=True)
class Auto(Natural):
    """`Natural`, unless its measured step takes away little of the loss: then plain LoRA.

    A step that brings the model nearer to the data moves every layer, and what it moves has to be worth
    it. `get_peft_model` measures on held-back sequences what share of the loss is gone before training.
    Below `least_gain` the adapter is the one that PEFT itself draws, by the same random numbers, so
    that training is the plain PEFT run with the same seed. A head that is new, and so still random, is
    the usual case.

    Without data to measure on (``statistics`` alone) it is `Natural`. With both, all of the data is
    measured on: give other data than the statistics are of, or what is measured is too good.

    Args:
        least_gain: smallest share of the loss that the start must take away; of a loss that may be
            negative (preferences, rewards) there is no share, and it is the smallest difference.
            In the benchmark's runs one step of Natural took away 44 to 80% on the language model, 21 to
            54% on the image model and 0.4 to 5% under a new head; where it was below a quarter it ended
            below plain LoRA on three of four tasks (docs/natural.md). It was set for one step.

    The others are `Natural`'s.
    """

    least_gain: float = 0.25
