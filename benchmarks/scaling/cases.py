"""What is measured on how many processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.common import decoder as cases


@dataclass(frozen=True)
class Case:
    """One model, placed in one way, and one amount of data over all processes."""

    kind: str
    sequences: int
    tokens: int = 512
    batch: int = 8
    shape: str = "llama-2-7b"
    start: bool = False
    limit: int = 90

    def whole(self) -> cases.Case:
        """The same amount of data for one process."""
        return cases.Case(
            "",
            "",
            self.shape,
            sequences=self.sequences,
            tokens=self.tokens,
            batch=self.batch,
        )

    @property
    def key(self) -> str:
        """What a reference must have in common with it."""
        return f"{self.shape} {self.sequences} x {self.tokens} by {self.batch}"


def plan_of(
    world: int, kinds: Sequence[str], *, tiny: bool, batch: int | None = None
) -> list[Case]:
    """What is measured on so many processes; the most wanted first."""
    kinds = ["plain"] if world == 1 else kinds
    cases = [Case(kind, 64, start=True) for kind in kinds]
    cases += [Case(kind, 256) for kind in kinds]
    if batch is not None:
        cases = [Case(kind, 256, batch=batch) for kind in kinds]
    if tiny:
        cases = [replace(c, tokens=16, batch=4, shape="tiny") for c in cases]
    return cases
