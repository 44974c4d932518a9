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
    the usual case: the gradient then says more about the head than about the data.

    Without data to measure on (``statistics`` alone) it is `Natural`.

    Args:
        least_gain: smallest share of the loss, where that is above zero, that the start must take away.
            On the benchmark's twelve tasks Natural took away 22 to 79% on the language and image
            models and up to 3% under a new head, and was below plain LoRA at 22% and less
            (benchmarks/README.md).

    The others are `Natural`'s.
    """

    least_gain: float = 0.25
