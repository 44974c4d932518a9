"""The user's iterable as checked, capped batches: bad data fails here, before long work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lorainit.errors import DataError
from lorainit.statistics.packing import packed_segments

Batch = Mapping[str, Any]


def batch_rows(batch: Batch) -> int:
    """Rows of a batch: the first dimension that its labels, or else its first tensor, has."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() > 0:
        return labels.shape[0]
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    raise DataError(
        f"a batch has no tensors (keys: {', '.join(map(str, batch)) or 'none'}). Batches are "
        "dictionaries of tensors, as a DataLoader with return_tensors='pt' collation gives them."
    )


def row_sequences(batch: Batch, rows: int) -> list[int]:
    """Sequences in each row: one, or more where the batch says that rows are packed."""
    reference = batch.get("labels")
    if not isinstance(reference, Tensor) or reference.dim() != 2:
        reference = batch.get("input_ids")
    if not isinstance(reference, Tensor) or reference.dim() != 2 or reference.shape[1] == 0:
        return [1] * rows
    segments, _ = packed_segments(batch, reference)
    counts = []
    for row in segments:
        # Zeros that pad position ids look like sequences of one token, which predict nothing.
        lengths = row.unique(return_counts=True)[1]
        counts.append(max(1, int((lengths > 1).sum())))
    return counts


def first_rows(batch: Batch, rows: int, total: int) -> dict[str, Any]:
    """The batch cut to its first rows; what is not one entry a row stays as it is."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:rows] if value.dim() > 0 and value.shape[0] == total else value
        return value[:rows] if isinstance(value, list) and len(value) == total else value

    return {key: cut(value) for key, value in batch.items()}


def take(data: Iterable[Any], max_sequences: int | None) -> Iterator[dict[str, Any]]:
    """Batches until `max_sequences` sequences have been seen; the last one is cut to fit.

    Nothing is drawn from `data` beyond the batch that fills the sample. Batches of no rows, or of
    rows without a token, are passed over.

    Raises:
        DataError: something that is no dictionary of tensors.
    """
    if not isinstance(data, Iterable):
        raise DataError(
            f"data must be an iterable of batches, not {type(data).__name__}. Give a DataLoader, "
            "or a "
            "list of dictionaries."
        )
    seen = 0
    for index, batch in enumerate(data):
        if not isinstance(batch, Mapping):
            raise DataError(
                f"batch {index} is a {type(batch).__name__}, not a dictionary of the model's "
                "keyword "
                "arguments. Give a DataLoader whose collate function returns dictionaries."
            )
        batch = dict(batch)
        rows = batch_rows(batch)
        if rows == 0 or _is_empty(batch):
            continue
        counts = row_sequences(batch, rows)
        if max_sequences is not None:
            room = max_sequences - seen
            kept = 0
            while kept < rows and counts[kept] <= room:
                room -= counts[kept]
                kept += 1
            if kept < rows:
                # A packed row that does not fit ends the sample, unless it is the only one.
                kept = max(kept, 1 if seen == 0 else 0)
                if kept:
                    yield first_rows(batch, kept, rows)
                return
        seen += sum(counts)
        yield batch
        if max_sequences is not None and seen >= max_sequences:
            return


def one_row(batch: Batch) -> Batch:
    """The batch's first row, where its rows can run apart; else all of it."""
    return first_rows(batch, 1, batch_rows(batch)) if is_splittable(batch) else batch


def is_splittable(batch: Batch) -> bool:
    """Whether the batch's rows can run apart: all that it holds has one entry a row."""
    rows = batch_rows(batch)
    for key, value in batch.items():
        if isinstance(value, Tensor):
            if value.dim() > 0 and value.shape[0] != rows:
                return False
            # Rotary positions of several axes have the axes in front.
            if key == "position_ids" and value.dim() > 2:
                return False
        elif isinstance(value, list | tuple):
            if len(value) != rows:
                return False
        elif not (value is None or isinstance(value, str | bool | int | float)):
            return False
    return True


def split_rows(batches: list[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """The same sequences in batches of at most `rows` rows, where they can be split."""
    parts: list[dict[str, Any]] = []
    for batch in batches:
        total = batch_rows(batch)
        if total <= rows or not is_splittable(batch):
            parts.append(batch)
            continue
        for first in range(0, total, rows):
            part = slice(first, first + rows)
            parts.append(
                {
                    key: value[part]
                    if isinstance(value, list | tuple)
                    or (isinstance(value, Tensor) and value.dim() > 0)
                    else value
                    for key, value in batch.items()
                }
            )
    return parts


def _is_empty(batch: Batch) -> bool:
    ids = batch.get("input_ids")
    return isinstance(ids, Tensor) and ids.numel() == 0


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors, also in dictionaries and lists, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


def population_of(data: object) -> int | None:
    """Length of the data set behind a loader, where it has one."""
    dataset = getattr(data, "dataset", None)
    try:
        return len(dataset) if dataset is not None else None
    except (TypeError, NotImplementedError):
        return None


def split_batches(
    batches: list[dict[str, Any]],
    share: float,
    before: int = 0,
    anywhere: Callable[[bool], bool] = bool,
    fold: int = 0,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows kept, and about `share` of all rows held back: every so many-th, whatever the batching.

    Args:
        batches: this process's.
        share: to hold back.
        before: rows that other processes have before these.
        anywhere: whether something holds on some process.
        fold: another one holds back other rows; after as many as it takes, all have been.

    Returns:
        Kept and held back; each may be empty on a process, not on all.

    Raises:
        DataError: too few rows for both, or a share that is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise DataError(f"calibration_share must be between 0 and 1, got {share}")
    every = max(2, round(1 / share))
    kept: list[dict[str, Any]] = []
    held: list[dict[str, Any]] = []
    seen = before
    for batch in batches:
        rows = batch_rows(batch)
        index = torch.arange(seen, seen + rows)
        seen += rows
        back = (index + fold) % every == every - 1
        for part, mask in ((kept, ~back), (held, back)):
            if bool(mask.any()):
                part.append(rows_where(batch, mask, rows))
    has_kept, has_held = anywhere(bool(kept)), anywhere(bool(held))
    if not (has_kept and has_held):
        raise DataError(
            f"data has {seen} rows, too few to hold back {share:.0%} for measuring the length of "
            "the "
            f"start: give at least {every}, or a method with a fixed length."
        )
    return kept, held


def rows_where(batch: Batch, mask: Tensor, rows: int) -> dict[str, Any]:
    """The rows of a batch that `mask`, ``(rows,)`` booleans, is true for."""

    def chosen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows:
            return value[mask.to(value.device)]
        if isinstance(value, list) and len(value) == rows:
            return [item for item, kept in zip(value, mask.tolist(), strict=True) if kept]
        return value

    return {key: chosen(value) for key, value in batch.items()}
