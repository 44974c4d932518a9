"""Auto: the default. Natural where it is worth it, plain LoRA where it is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorainit.methods._settings import require_number
from lorainit.methods.kronecker_qer import KroneckerQER
from lorainit.methods.natural import Natural


@dataclass(frozen=True)
class Auto(Natural):
    """`Natural`, unless its measured step takes away little of the loss: then plain LoRA.

    A step that brings the model nearer to the data moves every layer, and what it moves has to be worth
    it. `get_peft_model` measures on held-back sequences what share of the loss is gone before training.
    Below `least_gain` the adapter is the one that PEFT itself draws, by the same random numbers, so
    that training is the plain PEFT run with the same seed.

    Where a head beside the adapter was fitted first (``fit_heads``), no step is taken and no statistics are
    collected: after it a step helps on some data and costs on other, and its measured gain does not say
    which (docs/heads.md). `Natural` takes it.

    Without data to measure on (``statistics`` alone) it is `Natural`. With both, all of the data is
    measured on: give other data than the statistics are of, or what is measured is too good.

    Args:
        least_gain: smallest share of the loss that the start must take away; of a loss that may be
            negative (preferences, rewards) there is no share, and it is the smallest difference.
            In the benchmark's runs one step of Natural took away 44 to 80% on the language model, 21 to
            54% on the image model and 0.4 to 5% under a new head; where it was below a quarter it ended
            below plain LoRA on three of four tasks (docs/natural.md). It was set for one step.

        least_taken: with ``reference_weights``, of ``|W - Q| / |W|`` (its median over layers): below it
            nothing is given back. Between 4 bits (0.1) and 3 (0.2): on six tasks trained at six rates or more,
            the task's step alone ended best at NF4, what was given back at 3 and 2 bits (docs/quantized.md).

    The others are `Natural`'s.

    With ``reference_weights`` of a base of three bits or less it is `KroneckerQER`, unless that does not lower
    the loss on the held-back sequences. `Natural`'s step on top of it, in the same rank, was tried: it is worth
    much before training and ends 0.02 nats above what was given back alone (docs/quantized.md).
    """

    least_gain: float = 0.25
    least_taken: float = 0.125

    needs_reference: ClassVar[bool] = False
    beside_fitted_heads: ClassVar[str] = (
        "a head was fitted first, and a step after it pays on some data alone"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("least_taken", self.least_taken)

    @property
    def giving_back(self) -> KroneckerQER:
        """What is taken at three bits and less, where the reference weights are there."""
        return KroneckerQER()
