"""A sample of the data: at most so many sequences over all processes, and a share of them held back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from lorainit.data.batch import Batch
from lorainit.errors import DataError
from lorainit.parallel import collectives


@dataclass(frozen=True, eq=False)
class Sample:
    """This process's part of the sequences that are looked at.

    Attributes:
        batches: of them.
        population: samples to fine-tune on, where the data know their number.
        before: units of the processes of lower rank.
    """

    batches: list[Batch]
    population: int | None = None
    before: int = 0

    @property
    def sequences(self) -> int:
        """How many this process has."""
        return sum(batch.sequences for batch in self.batches)

    def with_batches(self, batches: list[Batch]) -> Sample:
        """Other batches of this process; every process has to call this."""
        rank, _ = collectives.world()
        units = collectives.gather_objects(sum(batch.units for batch in batches))
        return Sample(batches, self.population, int(sum(units[:rank])))

    def held_back(self, share: float, fold: int = 0) -> tuple[Sample, Sample]:
        """The sample without about `share` of its units, and these: every so many-th, whatever the batching.

        Args:
            share: to hold back.
            fold: another one holds back other units; after as many as it takes, all have been.

        Returns:
            Kept and held back; each may be empty on a process, not on all.

        Raises:
            DataError: too few units for both, or a share that is not between 0 and 1.
        """
        if not 0 < share < 1:
            raise DataError(f"calibration_share must be between 0 and 1, got {share}")
        units = int(collectives.sum_counts([sum(batch.units for batch in self.batches)])[0])
        every = max(2, round(1 / share))
        apart = all(batch.separable for batch in self.batches)
        if collectives.any_process(not apart) and units > 1:
            # Whole batches are few.
            every = min(every, units)
        kept: list[Batch] = []
        held: list[Batch] = []
        seen = self.before
        for batch in self.batches:
            back = [(seen + unit + fold) % every == every - 1 for unit in range(batch.units)]
            seen += batch.units
            kept += batch.take([not flag for flag in back])
            held += batch.take(back)
        if not (collectives.any_process(bool(kept)) and collectives.any_process(bool(held))):
            what = "sequences" if apart else "batches (their sequences cannot run apart)"
            raise DataError(
                f"data has {units} {what}, too few to hold back {share:.0%} for measuring the length of "
                f"the start: give at least {every}, or a method with a fixed length."
            )
        return Sample(kept, self.population), Sample(held, self.population)


def draw_sample(data: object, max_sequences: int | None, config: object = None) -> Sample:
    """This process's part of at most `max_sequences` sequences over all processes.

    Equal parts, where every process has them; who has more gives more. Nothing is drawn from `data`
    beyond the batch that fills the part.

    Args:
        data: the user's iterable of batches.
        max_sequences: None for all.
        config: of the model, where it has one.

    Raises:
        DataError: no process has a sequence, or something is no dictionary of tensors.
        ProcessError: another process's data failed.
    """
    rank, size = collectives.world()
    population = shared_population(data)
    if size == 1:
        batches = list(take_sequences(arriving(data, config), max_sequences))
    else:
        batches = _part_of_process(data, max_sequences, config, rank, size)
    if not collectives.any_process(bool(batches)):
        raise DataError(
            "data gave no sequences: the iterable is empty, or exhausted by an earlier pass. "
            "Give a DataLoader or a list of batches."
        )
    return Sample([], population).with_batches(batches)


def arriving(data: object, config: object = None) -> Iterator[Batch]:
    """The user's batches one by one, without those of no rows, or of rows without a token.

    Raises:
        DataError: something that is no dictionary of tensors.
    """
    if not isinstance(data, Iterable):
        raise DataError(
            f"data must be an iterable of batches, not {type(data).__name__}. Give a DataLoader, "
            "or a list of dictionaries."
        )
    for index, content in enumerate(data):
        batch = Batch.arrived(content, index, config)
        if not batch.is_empty:
            yield batch


def take_sequences(batches: Iterable[Batch], most: int | None) -> Iterator[Batch]:
    """Batches until `most` sequences have been seen; the last one is cut to fit where it can be.

    A unit that does not fit ends the sample, unless it is the first.
    Nothing is drawn beyond the batch that fills the sample.
    """
    seen = 0
    for batch in batches:
        room = None if most is None else most - seen
        if room is not None and batch.sequences > room:
            ends = list(accumulate(batch.unit_sequences))
            if seen == 0:
                ends[0] = 0
            yield from batch.take([end <= room for end in ends])
            return
        seen += batch.sequences
        yield batch
        if most is not None and seen >= most:
            return


def _part_of_process(
    data: object, cap: int | None, config: object, rank: int, size: int
) -> list[Batch]:
    kept: list[Batch] = []
    if cap is None:
        with collectives.shared_errors():
            kept += arriving(data, config)
        return kept
    rest: Any = None
    have, exhausted = 0, False
    part = cap // size + (1 if rank < cap % size else 0)
    while True:
        with collectives.shared_errors():
            rest = arriving(data, config) if rest is None else rest
            while have < part and not exhausted:
                batch = next(rest, None)
                if batch is None:
                    exhausted = True
                else:
                    kept.append(batch)
                    have += batch.sequences
        known = collectives.gather_objects((have, exhausted))
        parts = collectives.parts_of_cap(cap, [n for n, _ in known], [not end for _, end in known])
        part = parts[rank]
        if all(wanted <= has for wanted, (has, _) in zip(parts, known, strict=True)):
            return list(take_sequences(kept, part)) if part else []


def shared_population(data: object) -> int | None:
    """Samples to fine-tune on: one set's length if all processes hold the same, else their sum."""
    lengths = [n for n in collectives.gather_objects(population_of(data)) if n is not None]
    if len(set(lengths)) == 1:
        return int(lengths[0])
    return sum(lengths) if lengths else None


def population_of(data: object) -> int | None:
    """Length of the data set behind a loader, where it has one."""
    dataset = getattr(data, "dataset", None)
    try:
        return len(dataset) if dataset is not None else None
    except (TypeError, NotImplementedError):
        return None
