"""A trainer's own loss as a loss of statistics: a batch is one unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorainit.errors import DataError
from lorainit.trainers.kinds import examples_in
from lorainit.trainers.unchanged import by_itself


@dataclass(frozen=True, eq=False)
class TrainerLoss:
    """``trainer.compute_loss`` of a batch, as often as the batch holds examples.

    A trainer's loss is the mean of ``n`` examples' losses ``l_i``, or compares them with each other. Given
    ``n`` times, its sum is ``sum_i l_i``: where examples have losses of their own, statistics are those of
    single examples, whatever the batches.

    Attributes:
        trainer: as built.
    """

    trainer: Any

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """``(examples,)``, all equal, with their graph.

        Raises:
            DataError: what the trainer computes is no single number.
        """
        count = examples_in(self.trainer, batch)
        # A loss may take entries out of its batch, or put some in.
        own = dict(batch) if isinstance(batch, Mapping) else batch
        with by_itself(self.trainer.accelerator):
            loss = self.trainer.compute_loss(self.trainer.model, own)
        loss = loss[0] if isinstance(loss, tuple) else loss
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise DataError(
                f"{type(self.trainer).__name__}.compute_loss gave {shape}, not one number. Pass loss_fn=..., a "
                "function of (model, batch) that returns one loss per sequence."
            )
        return loss.reshape(1).expand(count)
