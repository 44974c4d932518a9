"""The batches that a trainer would train on, drawn from its own loader without its noticing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset

from lorainit.data.nested import to_device
from lorainit.errors import DataError
from lorainit.models.state import unchanged_generators
from lorainit.parallel import collectives
from lorainit.trainers.kinds import is_on_policy
from lorainit.trainers.on_policy import answered


class DrawnBatches(list[Any]):
    """Batches of a trainer, with what tells how many samples there are to train on.

    Attributes:
        dataset: the trainer's training set.
        batch_size: samples that a batch is made of.
    """

    def __init__(self, batches: list[Any], dataset: object, batch_size: int | None) -> None:
        super().__init__(batches)
        self.dataset, self.batch_size = dataset, batch_size


def draw_batches(trainer: Any, most: int | None, count: Callable[[Any], int]) -> DrawnBatches:
    """The first batches of the trainer's own loader, collated as for training.

    Every process draws as many, since loaders and rollouts of several processes go in step.

    Args:
        trainer: as built.
        most: examples over all processes, after which the drawing ends; None for all of the data.
        count: examples in a batch that count.

    Returns:
        This process's batches, on the CPU; perhaps some examples more than `most`.

    Raises:
        DataError: no training set, or one that gives its samples only once.
    """
    dataset = getattr(trainer, "train_dataset", None)
    _check_dataset(dataset)
    loader = trainer.get_train_dataloader()
    drawn: list[Any] = []
    mine = 0
    host = torch.device("cpu")
    with unchanged_generators(loader):
        batches = iter(loader)
        try:
            while most is None or collectives.sum_counts([mine])[0] < most:
                content = next(batches, None)
                if collectives.every_process(content is None):
                    break
                if content is None:
                    continue
                found = answered(trainer, content) if is_on_policy(trainer) else [content]
                found = [to_device(batch, host) for batch in found]
                mine += sum(map(count, found))
                drawn += found
        finally:
            _leave(loader, batches)
    size = None if is_on_policy(trainer) else getattr(trainer, "_train_batch_size", None)
    return DrawnBatches(drawn, dataset, size)


def _check_dataset(dataset: object) -> None:
    if dataset is None:
        raise DataError("the trainer has no train_dataset to measure a start on: give it one.")
    if isinstance(dataset, IterableDataset) and id(iter(dataset)) == id(dataset):
        raise DataError(
            f"the trainer's train_dataset ({type(dataset).__name__}) gives its samples only once, so those "
            "that a start is measured on would be missing from the training. Give one whose __iter__ "
            "begins anew, such as datasets.IterableDataset.from_generator(...)."
        )


def _leave(loader: Any, batches: Iterator[Any]) -> None:
    """End an iteration half-way: accelerate's loaders tell their accelerator only at their end."""
    close = getattr(batches, "close", None)
    if callable(close):
        close()
    state = getattr(loader, "gradient_state", None)
    if state is not None and any(loader is known for known in state.dataloader_references):
        loader.end()
