"""The loss of a sample as a function of the weights of the model's heads alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorainit.calibration.paired import SequenceLosses
from lorainit.data.batch import Batch
from lorainit.linalg.dtypes import HALF, sum_dtype
from lorainit.models.heads import CannotRunAlone, HeadRun, Values, still_modules
from lorainit.models.state import unchanged_rng
from lorainit.parallel import collectives
from lorainit.statistics.loss.batch_loss import BatchLoss, batch_loss
from lorainit.statistics.loss.vocabulary import tokens_named
from lorainit.statistics.settings import Subject

_TOLERANCE = 1e-3
"""Relative difference, over a batch, of its losses by the whole model and from the heads on."""

_TOLERANCE_IN_HALF = 2e-2


@dataclass(frozen=True, eq=False)
class HeadPart:
    """One batch, run once.

    Attributes:
        batch: on the model's device.
        run: what the model gave before the heads.
        shapes: of each head's output.
        used: by head, positions of its output (flattened) that the loss depends on.
        features: by head, ``(used, in)`` inputs at these positions, on the host.
    """

    batch: Batch
    run: HeadRun
    shapes: Mapping[str, torch.Size]
    used: Mapping[str, Tensor]
    features: Mapping[str, Tensor]


class HeadLoss:
    """The loss of batches as a function of the heads; the model is being measured while it is used.

    Whether the loss of the whole model is one of the heads' outputs is tried on every batch: it must be
    what it is when the model runs from its heads on.

    Args:
        subject: the model, and how its loss is taken.
        heads: linear layers by name.
        batches: this process's; those whose loss is not finite are left out.

    Raises:
        CannotRunAlone: it is not.
    """

    def __init__(
        self, subject: Subject, heads: Mapping[str, nn.Linear], batches: Sequence[Batch]
    ) -> None:
        self.subject, self.heads = subject, heads
        self.device = subject.device
        self.still = still_modules(subject.model, heads)
        found = [self._run(batch.to(self.device)) for batch in batches]
        self.parts = [part for part in found if part is not None]

    def features(self, name: str) -> list[Tensor]:
        """What reaches a head, batch by batch, ``(used, in)``."""
        return [part.features[name] for part in self.parts if name in part.features]

    @torch.no_grad()
    def measured(self, values: Values) -> SequenceLosses:
        """The losses of this process's sequences with these weights."""
        with unchanged_rng(self.device):
            results = [self._loss(part, values) for part in self.parts]
        unit = "sequences" if self._by_sequence else "label_tokens"
        losses = [result.per_sequence.detach().reshape(-1).cpu() for result in results]
        return SequenceLosses(
            torch.cat(losses) if losses else torch.zeros(0),
            float(sum(int(result.sequences) for result in results)),
            float(sum(int(getattr(result, unit)) for result in results)),
        )

    def sums(self, values: Values) -> tuple[float, dict[str, tuple[Tensor, Tensor | None]]]:
        """The summed loss over this process's sequences, and its gradients, in float64 on the host."""
        leaves = {
            name: (
                weight.detach().requires_grad_(),
                None if bias is None else bias.detach().requires_grad_(),
            )
            for name, (weight, bias) in values.items()
        }
        total = 0.0
        with torch.enable_grad(), unchanged_rng(self.device):
            for part in self.parts:
                loss = self._loss(part, leaves).per_sequence.sum()
                total += float(loss.detach())
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
        return total, {
            name: (_gradient(weight), None if bias is None else _gradient(bias))
            for name, (weight, bias) in leaves.items()
        }

    @property
    def _by_sequence(self) -> bool:
        return self.subject.settings.loss_reduction == "sequence"

    def _loss(self, part: HeadPart, values: Values) -> BatchLoss:
        outputs = {}
        for name, shape in part.shapes.items():
            features = part.features[name]
            flat = features.new_zeros(shape).reshape(-1, shape[-1])
            if name in values and len(features):
                weight, bias = (None if v is None else v.to(features) for v in values[name])
                assert weight is not None
                flat = flat.index_copy(0, part.used[name], F.linear(features, weight, bias))
            outputs[name] = flat.reshape(shape).to(self.device)
        return self._replayed(part.batch, part.run, outputs)

    def _replayed(self, batch: Batch, run: HeadRun, outputs: Mapping[str, Tensor]) -> BatchLoss:
        settings = self.subject.settings
        with run.replaying(self.heads, self.still, outputs):
            return batch_loss(
                self.subject.model, batch.content, settings.loss_reduction, settings.loss_fn
            )

    def _run(self, batch: Batch) -> HeadPart | None:
        """Run a batch, and find where its loss depends on the heads."""
        model, settings, run = self.subject.model, self.subject.settings, HeadRun()
        with (
            torch.no_grad(),
            unchanged_rng(self.device),
            tokens_named(model, batch),
            run.recording(self.heads, self.still),
        ):
            whole = batch_loss(model, batch.content, settings.loss_reduction, settings.loss_fn)
        if not bool(torch.isfinite(whole.per_sequence).all()):
            return None
        outputs = {}
        for name, x in run.inputs.items():
            head = self.heads[name]
            weight, bias = (
                None if v is None else v.detach().to(x) for v in (head.weight, head.bias)
            )
            assert weight is not None
            outputs[name] = F.linear(x, weight, bias)
        try:
            with unchanged_rng(self.device):
                used = self._used(batch, run, outputs)
            with torch.no_grad(), unchanged_rng(self.device):
                again = self._replayed(batch, run, outputs)
        except (torch.OutOfMemoryError, CannotRunAlone):
            raise
        except Exception as error:
            raise CannotRunAlone(f"{type(error).__name__}: {error}") from error
        half = any(x.dtype in HALF for x in outputs.values())
        tolerance = _TOLERANCE_IN_HALF if half else _TOLERANCE
        first, second = whole.per_sequence.double(), again.per_sequence.double()
        if first.shape != second.shape or (first - second).norm() > tolerance * first.norm():
            raise CannotRunAlone("the loss depends on more than the heads' outputs")
        run.inputs, inputs = {}, run.inputs
        return HeadPart(
            batch,
            run,
            {name: y.shape for name, y in outputs.items()},
            used,
            {
                name: x.reshape(-1, x.shape[-1])[used[name].to(x.device)]
                .to(sum_dtype(x.dtype))
                .cpu()
                for name, x in inputs.items()
            },
        )

    def _used(self, batch: Batch, run: HeadRun, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Positions of each head's output where the loss has a gradient.

        Taken where the outputs are random, since a loss may have none where they happen to be right.
        """
        generator = torch.Generator().manual_seed(0)
        leaves = {
            name: torch.randn(y.shape, generator=generator).to(y.device, sum_dtype(y.dtype))
            for name, y in outputs.items()
        }
        with torch.enable_grad():
            for leaf in leaves.values():
                leaf.requires_grad_()
            loss = self._replayed(batch, run, leaves).per_sequence.sum()
            found: tuple[Tensor | None, ...] = (None,) * len(leaves)
            if loss.requires_grad:
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros(0, dtype=torch.long)
            if gradient is None
            else gradient.reshape(-1, gradient.shape[-1]).ne(0).any(-1).nonzero().flatten().cpu()
            for name, gradient in zip(leaves, found, strict=True)
        }


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.double()


def summed(tensor: Tensor) -> Tensor:
    """Added over all processes in rank order: the same to the last bit on all of them."""
    total: Tensor = sum(collectives.gather_objects(tensor.double().cpu()))  # type: ignore[assignment]
    return total
