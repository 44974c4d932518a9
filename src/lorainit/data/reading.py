"""The user's batches one by one, and what is known of them when they have been seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lorainit.data.batch import Batch
from lorainit.errors import DataError
from lorainit.parallel import collectives

ALL_MASKED = (
    "every label is masked: not one that the loss counts differs from -100, so there is no "
    "gradient. "
    "Look at the collator's prompt masking, and at truncation that cuts the answers off."
)
"""What is wrong where no sequence has a label."""


@dataclass(frozen=True)
class Together:
    """Whether a batch's sequences belong together, and as how many it counts then.

    Attributes:
        whole: no batch is cut.
        share: sequences that a batch counts as, over those that its layout tells.
    """

    whole: bool = False
    share: float = 1.0


@dataclass(frozen=True)
class Reading:
    """How batches are read.

    Attributes:
        config: of the model, where it has one: it says which tokens stand for images.
        own_loss: a loss function of the user's takes the batches, as they are.
        together: told of the first batch, whether batches may be cut; called on all processes at once,
            with None where there is none.
        labelled: of each unit of a batch, whether it has a label that a loss counts; None: all count.
    """

    config: object = None
    own_loss: bool = False
    together: Callable[[Batch | None], Together] | None = None
    labelled: Callable[[Batch], list[bool]] | None = None


class Reader:
    """The user's iterable as batches, without those of no rows, or of rows without a token.

    Sequences without a label are left out.

    Attributes:
        batches: that have been drawn.
        rows: of them.
        sequences: of them.
        unlabelled: sequences that were left out.
    """

    def __init__(self, data: object, reading: Reading) -> None:
        self.data, self.reading = data, reading
        self.batches = self.rows = self.sequences = self.unlabelled = 0
        self._known = Together()
        self._first: list[Batch] = []
        self._rest: Iterator[Batch] | None = None

    def look(self) -> None:
        """Draw the first batch, and be told whether batches may be cut; all processes at once."""
        if self.reading.together is None:
            return
        with collectives.shared_errors():
            self._rest = self._arriving()
            self._first = [b for b in [next(self._rest, None)] if b is not None]
        self._known = self.reading.together(self._first[0] if self._first else None)

    def __iter__(self) -> Iterator[Batch]:
        first, self._first = self._first, []
        rest = self._arriving() if self._rest is None else self._rest
        for batches in (first, rest):
            for batch in batches:
                yield from self._counted(batch)

    def _arriving(self) -> Iterator[Batch]:
        if not isinstance(self.data, Iterable):
            raise DataError(
                f"data must be an iterable of batches, not {type(self.data).__name__}. Give a "
                "DataLoader, or a list of dictionaries."
            )
        reading = self.reading
        for index, content in enumerate(self.data):
            batch = Batch.arrived(content, index, reading.config, own_loss=reading.own_loss)
            if not batch.is_empty:
                yield batch

    def _counted(self, batch: Batch) -> list[Batch]:
        self.batches += 1
        self.rows += batch.rows
        self.sequences += batch.sequences
        if self._known.whole:
            count = max(1, round(batch.sequences * self._known.share))
            return [replace(batch, whole=True, losses=count)]
        if self.reading.labelled is None:
            return [batch]
        left = batch.take(self.reading.labelled(batch))
        self.unlabelled += batch.sequences - sum(part.sequences for part in left)
        return left


def population_of(data: object) -> int | None:
    """Length of the data set behind a loader, where it has one."""
    dataset: Any = getattr(data, "dataset", None)
    try:
        return len(dataset) if dataset is not None else None
    except (TypeError, NotImplementedError):
        return None


def shared_population(reader: Reader) -> int | None:
    """Sequences to fine-tune on: one set's length if all processes hold the same, else their sum.

    Of a data set whose samples are packed rows, its length times the sequences of a sample, as the
    batches that were drawn have them; exact where all have been.
    """
    lengths = [n for n in collectives.gather_objects(population_of(reader.data)) if n is not None]
    if not lengths:
        return None
    total: int = lengths[0] if len(set(lengths)) == 1 else sum(lengths)
    seen = collectives.gather_objects((reader.sequences, reader.rows, _samples(reader)))
    sequences, rows = (sum(column) for column in list(zip(*seen, strict=True))[:2])
    samples = [n for *_, n in seen]
    if sequences <= rows or None in samples:
        return total
    share: float = sequences / sum(int(n) for n in samples)
    return round(total * share)


def _samples(reader: Reader) -> int | None:
    """Samples of the data set that the drawn batches are made of, where that is known."""
    data: Any = reader.data
    size = getattr(data, "batch_size", None)
    if size is None and getattr(data, "batch_sampler", None) is None:
        size = 1
    length = population_of(data)
    if size is None or length is None:
        return None
    drawn: int = reader.batches * int(size)
    return min(drawn, length)
