"""A sample of the data: at most so many sequences over all processes, and a share of them held back."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from lorainit.data.batch import Batch
from lorainit.data.joining import joined
from lorainit.data.reading import ALL_MASKED, Reader, Reading, shared_population
from lorainit.errors import DataError
from lorainit.parallel import collectives

logger = logging.getLogger("lorainit")


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

    def at_most(self, sequences: int | None) -> Sample:
        """No more than so many sequences over all processes, shared as `draw_sample` shares them."""
        have = collectives.gather_objects(self.sequences)
        if sequences is None or sum(have) <= sequences:
            return self
        rank, _ = collectives.world()
        part = collectives.parts_of_cap(sequences, have, [False] * len(have))[rank]
        return self.with_batches(list(take_sequences(self.batches, part)) if part else [])

    def first(self, sequences: int) -> Sample:
        """About so many sequences over all processes, from every process as large a share of its own."""
        everywhere = collectives.sum_counts([self.sequences])[0]
        room = math.ceil(self.sequences * min(1.0, sequences / max(everywhere, 1.0)))
        batches: list[Batch] = []
        for batch in self.batches:
            if room <= 0:
                break
            part = batch.take([unit < room for unit in range(batch.units)])
            batches += part
            room -= sum(piece.sequences for piece in part)
        return self.with_batches(batches)

    def held_back(self, share: float, fold: int = 0) -> tuple[Sample, Sample]:
        """The sample without about `share` of its units, and these: every so many-th, whatever the batching.

        Args:
            share: to hold back.
            fold: another one holds back other units; after as many as it takes, all have been.

        Returns:
            Kept and held back; each may be empty on a process, not on all. What is held back runs in
            batches as large as the sample's.

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
                f"the start or its learning rate: give at least {every}, or a method with a fixed length."
            )
        rows = max((batch.rows for batch in self.batches), default=1)
        positions = max((batch.positions for batch in self.batches), default=1)
        held = joined(held, rows, positions)
        return Sample(kept, self.population), Sample(held, self.population)


def draw_sample(data: object, max_sequences: int | None, reading: Reading | None = None) -> Sample:
    """This process's part of at most `max_sequences` sequences over all processes.

    Equal parts, where every process has them; who has more gives more. Nothing is drawn from `data`
    beyond the batch that fills the part. Sequences without a label do not count.

    Args:
        data: the user's iterable of batches.
        max_sequences: None for all.
        reading: how batches are read.

    Raises:
        DataError: no process has a sequence, or one with a label, or something is no dictionary of
            tensors.
        ProcessError: another process's data failed.
    """
    rank, size = collectives.world()
    reader = Reader(data, reading or Reading())
    reader.look()
    if size == 1:
        batches = list(take_sequences(reader, max_sequences))
    else:
        batches = _part_of_process(reader, max_sequences, rank, size)
    unlabelled, drawn = collectives.sum_counts([reader.unlabelled, reader.sequences])
    if not collectives.any_process(bool(batches)):
        if unlabelled:
            raise DataError(ALL_MASKED)
        raise DataError(
            "data gave no sequences: the iterable is empty, or exhausted by an earlier pass. "
            "Give a DataLoader or a list of batches."
        )
    if unlabelled:
        logger.warning(
            "%d of %d sequences have nothing to learn (every label is -100: prompts, or answers that "
            "a maximal length cut off) and do not count",
            unlabelled,
            drawn,
        )
    return Sample([], shared_population(reader)).with_batches(batches)


def arriving(data: object, reading: Reading | None = None) -> Iterator[Batch]:
    """The user's batches one by one, see `Reader`.

    Raises:
        DataError: something that is no dictionary of tensors.
    """
    return iter(Reader(data, reading or Reading()))


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


def _part_of_process(reader: Reader, cap: int | None, rank: int, size: int) -> list[Batch]:
    kept: list[Batch] = []
    if cap is None:
        with collectives.shared_errors():
            kept += reader
        return kept
    rest = iter(reader)
    have, exhausted = 0, False
    part = cap // size + (1 if rank < cap % size else 0)
    while True:
        with collectives.shared_errors():
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
