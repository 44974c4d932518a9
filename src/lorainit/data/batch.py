"""A batch: what the model's forward takes at once, and which of its parts may run apart.

This is the one place that knows how a batch is laid out. What runs apart is a *unit*: a sequence (a row
of the tensors, or one of several that are packed into a row), or the whole batch where it holds
anything that is not one entry a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lorainit.data.images import image_owners
from lorainit.data.nested import tensors_in, to_device
from lorainit.data.packing import (
    CUMULATIVE_LENGTHS,
    LONGEST,
    packed_segments,
    positions_can_be_taken,
    row_of,
)
from lorainit.errors import DataError

FILLER = -1
"""Index of a batch that only keeps other processes company."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of the data, or some units of one.

    Attributes:
        content: keywords of the model's forward, as they arrived; with a loss function of the user's
            own, anything that it takes.
        index: of the batch in the data; `FILLER` for one that counts nothing.
        names: which of the arrived batch's units each unit is; empty: all of them, in order.
        owners: of tensors that are not one entry a row, such as patches of images: by key, the row of
            each entry, ``(entries,)`` integers on the CPU, in order.
        whole: never cut, whatever its layout.
        losses: of a batch that is never cut, as how many sequences it counts; None: as many as its
            layout tells.
    """

    content: Any
    index: int = 0
    names: tuple[int, ...] = ()
    owners: Mapping[str, Tensor] = field(default_factory=dict)
    whole: bool = False
    losses: int | None = None

    @classmethod
    def arrived(
        cls, content: object, index: int, config: object = None, *, own_loss: bool = False
    ) -> Batch:
        """A batch of the user's.

        Args:
            content: what the data gave.
            index: of the batch in the data.
            config: of the model, where it has one: it says which tokens stand for images.
            own_loss: a loss function of the user's takes it, as it is.

        Raises:
            DataError: it is no dictionary of tensors, and the model itself is to take it.
        """
        if isinstance(content, Batch):
            return replace(content, index=index)
        if not isinstance(content, Mapping):
            if own_loss:
                return cls(content, index, whole=True)
            raise DataError(
                f"batch {index} is a {type(content).__name__}, not a dictionary of the model's "
                "keyword arguments. Give a DataLoader whose collate function returns dictionaries, or "
                "a loss_fn that takes it."
            )
        flat = any(isinstance(v, Tensor) and v.dim() > 0 for v in content.values())
        if own_loss and not flat:
            return cls(content, index, whole=True)
        batch = cls(dict(content) if own_loss else as_keywords(content), index)
        return replace(batch, owners=image_owners(batch.content, batch.rows, config))

    @property
    def keywords(self) -> Mapping[str, Any]:
        """The content where it is keywords; nothing where it is anything else."""
        return self.content if isinstance(self.content, Mapping) else {}

    @property
    def counts(self) -> bool:
        """Whether statistics count it."""
        return self.index != FILLER

    @cached_property
    def rows(self) -> int:
        """The first dimension that its labels, or else its first tensor, has; one where nothing tells."""
        labels = self.keywords.get("labels")
        if isinstance(labels, Tensor) and labels.dim() > 0:
            return labels.shape[0]
        for value in self.keywords.values():
            if isinstance(value, Tensor) and value.dim() > 0:
                return value.shape[0]
        if self.whole:
            return 1
        raise DataError(
            f"a batch has no tensors (keys: {', '.join(map(str, self.content)) or 'none'}). Batches are "
            "dictionaries of tensors, as a DataLoader with return_tensors='pt' collation gives them."
        )

    @property
    def is_empty(self) -> bool:
        """Whether it has no rows, or rows without a token."""
        ids = self.keywords.get("input_ids")
        return self.rows == 0 or (isinstance(ids, Tensor) and ids.numel() == 0)

    @property
    def positions(self) -> int:
        """Tokens, padding counted; numbers of its largest tensor, where it has none."""
        for key in ("input_ids", "labels", "inputs_embeds"):
            value = self.keywords.get(key)
            if isinstance(value, Tensor) and value.dim() >= 2:
                return value.shape[0] * value.shape[1]
        return max((tensor.numel() for tensor in tensors_in(self.content)), default=1)

    @cached_property
    def separable(self) -> bool:
        """Whether its rows can run apart: all that it holds has one entry a row."""
        if self.whole:
            return False
        if self.rows == 1 and self._segments is None:
            return True
        return all(self._is_by_row(key, value) for key, value in self.content.items())

    def _is_by_row(self, key: str, value: Any) -> bool:
        if key in self.owners:
            return True
        if key in CUMULATIVE_LENGTHS or key in LONGEST:
            return self.rows == 1
        if isinstance(value, Tensor):
            return value.dim() == 0 or value.shape[_row_axis(key, value)] == self.rows
        if isinstance(value, list | tuple):
            return len(value) == self.rows
        return value is None or isinstance(value, str | bool | int | float)

    @cached_property
    def _segments(self) -> Tensor | None:
        """``(rows, length)``: the sequence of each position, where rows are of tokens."""
        reference = self.keywords.get("labels")
        if not isinstance(reference, Tensor) or reference.dim() != 2:
            reference = self.keywords.get("input_ids")
        if not isinstance(reference, Tensor) or reference.dim() != 2 or reference.shape[1] == 0:
            return None
        return packed_segments(self.content, reference)[0]

    @cached_property
    def _sequences(self) -> list[list[int]]:
        """Segments of each row that are sequences; one that is not packed has one."""
        if self._segments is None:
            return [[row] for row in range(self.rows)]
        found = []
        for row in self._segments:
            # Zeros that pad position ids look like sequences of one token, which predict nothing.
            numbers, lengths = row.unique(return_counts=True)
            longer = numbers[lengths > 1].tolist()
            found.append(longer or [int(numbers[0])])
        return found

    @cached_property
    def _groups(self) -> list[list[int]]:
        """Of each row, the sequences that may run apart: its own, or it as a whole."""
        if self._segments is None or positions_can_be_taken(self.content, self._segments):
            return self._sequences
        return [members[:1] for members in self._sequences]

    @cached_property
    def units(self) -> int:
        """How many parts may run apart."""
        return sum(map(len, self._groups)) if self.separable else 1

    @cached_property
    def sequences(self) -> int:
        """How many sequences there are, packed ones one by one."""
        if self.whole and self.losses is not None:
            return self.losses
        return sum(map(len, self._sequences))

    @property
    def unit_sequences(self) -> list[int]:
        """How many sequences each unit is."""
        if not self.separable:
            return [self.sequences]
        if self._groups == self._sequences:
            return [1] * self.units
        return [len(members) for members in self._sequences]

    @cached_property
    def unit_names(self) -> tuple[int, ...]:
        """Of each unit, which of the arrived batch's it is."""
        return self.names or tuple(range(self.units))

    def units_of(self, marked: Tensor) -> list[bool]:
        """For each unit, whether any of its entries is marked.

        Args:
            marked: booleans, ``(rows, ...)``; where rows are packed, ``(rows, length)``.
        """
        if not self.separable:
            return [bool(marked.any())]
        if all(len(row) == 1 for row in self._groups) or self._segments is None:
            found: list[bool] = (
                marked.flatten(1).any(1).tolist() if marked.dim() > 1 else marked.tolist()
            )
            return found
        hit = set(self._segments[marked.cpu()].tolist())
        return [member in hit for row in self._groups for member in row]

    def take(self, kept: Sequence[bool]) -> list[Batch]:
        """The units for which `kept` is true, as batches that run as they did: one, or none.

        Of rows that are packed each is a batch of its own if some of its sequences are left out.
        """
        kept = list(kept)
        if not any(kept):
            return []
        if all(kept):
            return [self]
        if all(len(row) == 1 for row in self._groups):
            return [self._with_rows(torch.tensor(kept), kept)]
        assert self._segments is not None
        batches, first = [], 0
        for row, members in enumerate(self._groups):
            own = slice(first, first := first + len(members))
            left = [member for member, k in zip(members, kept[own], strict=True) if k]
            if left:
                positions = torch.isin(self._segments[row], torch.tensor(left))
                content = row_of(self.content, row, positions, self._segments)
                names = tuple(n for n, k in zip(self.unit_names[own], kept[own], strict=True) if k)
                batches.append(Batch(content, self.index, names))
        return batches

    def cut(self, rows: int | None) -> list[Batch]:
        """The same units in batches of at most so many rows, where they can run apart; None: as it is."""
        if rows is None or self.rows <= rows or not self.separable:
            return [self]
        index = torch.arange(self.rows)
        of_unit = [row for row, members in enumerate(self._groups) for _ in members]
        return [
            self._with_rows(
                (index >= first) & (index < first + rows),
                [first <= row < first + rows for row in of_unit],
            )
            for first in range(0, self.rows, rows)
        ]

    def first_row(self) -> Batch:
        """One row, where rows can run apart; else all of it."""
        return self.cut(1)[0]

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors, also in dictionaries and lists, on `device`."""
        return replace(self, content=to_device(self.content, device))

    def filler(self) -> Batch:
        """The same, counting nothing."""
        return replace(self, index=FILLER)

    def bad_units(self, finite: Tensor) -> list[int]:
        """Which units a loss that is not finite belongs to.

        Args:
            finite: booleans, one a row, or one a sequence counted as `packed_segments` does.
        """
        bad = (~finite).nonzero().flatten().cpu()
        every = list(range(self.units))
        if not self.separable or len(bad) == 0:
            # Only the sum is not finite.
            return every
        rows = [row for row, members in enumerate(self._groups) for _ in members]
        if finite.shape[0] == self.rows:
            return [unit for unit in every if rows[unit] in bad]
        numbers = [member for members in self._groups for member in members]
        if len(numbers) != self.sequences:
            return every
        return [unit for unit in every if numbers[unit] in bad] or every

    def _with_rows(self, chosen: Tensor, kept: Sequence[bool]) -> Batch:
        """Some rows of everything.

        Args:
            chosen: ``(rows,)`` booleans.
            kept: the same by unit.
        """

        def of(key: str, value: Any) -> Any:
            if key in self.owners:
                return _entries(value, chosen[self.owners[key]], 0)
            if isinstance(value, Tensor) and value.dim() > 0:
                return _entries(value, chosen, _row_axis(key, value))
            if isinstance(value, list | tuple):
                left = (v for v, k in zip(value, chosen.tolist(), strict=True) if k)
                return list(left) if isinstance(value, list) else tuple(left)
            return value

        content = {key: of(key, value) for key, value in self.content.items()}
        names = tuple(n for n, k in zip(self.unit_names, kept, strict=True) if k)
        place = chosen.cumsum(0) - 1
        owners = {key: place[rows[chosen[rows]]] for key, rows in self.owners.items()}
        return Batch(content, self.index, names, owners)


def as_keywords(content: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords that every model takes: a row that has no batch axis gets one, and labels are int64.

    ``Dataset.with_format("torch")`` gives rows, and some data sets store labels in fewer bits.
    """
    found = dict(content)
    ids = found.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 1:
        found = {k: v.unsqueeze(0) if isinstance(v, Tensor) else v for k, v in found.items()}
    for key, value in found.items():
        whole = (
            isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
        )
        if whole and value.dtype != torch.bool and (key == "labels" or key.endswith("input_ids")):
            found[key] = value.long()
    return found


def _entries(value: Tensor, chosen: Tensor, axis: int) -> Tensor:
    """The entries along `axis` that `chosen` is true for; a view where they are neighbours."""
    index = chosen.nonzero().flatten()
    if len(index) and int(index[-1] - index[0]) + 1 == len(index):
        return value.narrow(axis, int(index[0]), len(index))
    return value.index_select(axis, index.to(value.device))


def _row_axis(key: str, value: Tensor) -> int:
    """Which dimension counts the rows: rotary positions of several axes have the axes in front."""
    return 1 if key == "position_ids" and value.dim() == 3 else 0
