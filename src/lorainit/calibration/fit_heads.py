r"""A model's heads, fitted on the features that reach them: linear probing before fine-tuning.

Kumar et al., arXiv 2202.10054. With ``L`` the model's own mean loss over the statistics' sequences, as a
function of the heads alone (logistic regression for classes, one for each label where there are several,
least squares for numbers), what is minimized is

    L(W, b) + sum_heads  w/2 |W - W_0|_F^2,     w = decay * tr(C) / in,

``W_0`` the head's present weights, ``C`` the covariance of its features, its bias free. The decay is the
one of `DECAYS` with the least loss on sequences that were not fitted on, and what was fitted is kept only
where it lowers that loss clearly.

A head of classes goes a part of the way: its weights move by `PART` of ``W - W_0``, its outputs at the mean
features are the fitted ones. Training lets such a head grow, and one that begins at the minimum ends with a
higher loss (docs/heads.md). A head of numbers, whose loss has a minimum that training stays at, goes all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorainit.calibration.head_loss import HeadLoss, summed
from lorainit.calibration.paired import Gain, SequenceLosses, gain
from lorainit.data.batch import Batch
from lorainit.linalg.lbfgs import minimize
from lorainit.linalg.principal import centred_basis
from lorainit.models.heads import CannotRunAlone, Values
from lorainit.models.state import measuring
from lorainit.parallel import collectives
from lorainit.statistics.settings import Subject

logger = logging.getLogger("lorainit")

DECAYS = tuple(10.0 ** (1 - i / 2) for i in range(11))
"""Weight decays that are tried, strongest first, in units of the features' mean variance."""

PART = 0.25
"""Of the way from the present weights to the fitted ones, where a head's outputs are logits of classes."""

_CURVATURE = 0.25
"""Of a logistic loss along its logit, at most: only the coordinates of the search depend on it."""


@dataclass(frozen=True, eq=False)
class HeadFit:
    """What was fitted.

    Attributes:
        values: ``(out, in)`` weight and ``(out,)`` bias by head, in float64; none where no head was.
        gain: what the minimum takes off the loss of the held-back sequences.
        before: that loss with the present heads.
        after: that loss with `values`.
        decay: that was chosen.
        tried: heads that the loss depends on.
    """

    values: Values
    gain: Gain
    before: float
    after: float
    decay: float
    tried: tuple[str, ...]


@dataclass(eq=False)
class _Coordinates:
    """One head's weights as ``W_0 + c V`` and ``b_0 + beta - c V mean``, with ``V`` orthonormal rows."""

    weight: Tensor
    bias: Tensor | None
    mean: Tensor
    directions: Tensor
    variances: Tensor
    decay: float = field(init=False)

    def __post_init__(self) -> None:
        self.decay = float(self.variances.sum()) / self.weight.shape[1]

    @property
    def size(self) -> int:
        return self.weight.shape[0] * (len(self.variances) + (self.bias is not None))

    def scales(self, decay: float) -> Tensor:
        """``(k,)``: what makes the curvature about one along every direction."""
        return (_CURVATURE * self.variances + decay * self.decay).rsqrt()

    def value(self, c: Tensor, beta: Tensor) -> tuple[Tensor, Tensor | None]:
        moved = c @ self.directions
        bias = None if self.bias is None else self.bias + beta - moved @ self.mean
        return self.weight + moved, bias

    def gradient(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if bias is None:
            return weight @ self.directions.mT, weight.new_zeros(0)
        return (weight - torch.outer(bias, self.mean)) @ self.directions.mT, bias


class HeadObjective:
    """The objective of the module, over all processes, in coordinates that suit a search.

    Args:
        loss: of the sequences to fit on.
        present: weight and bias that the decay goes toward, by head.
    """

    def __init__(self, loss: HeadLoss, present: Values) -> None:
        self.loss = loss
        self.heads: dict[str, _Coordinates] = {}
        for name, (weight, bias) in present.items():
            features = [f for own in collectives.gather_objects(loss.features(name)) for f in own]
            if not sum(len(f) for f in features):
                continue
            basis = centred_basis(torch.cat(features), centre=bias is not None)
            collectives.broadcast(basis, 0)
            self.heads[name] = _Coordinates(
                weight.double().cpu(), None if bias is None else bias.double().cpu(), *basis
            )
        self.unit = collectives.sum_counts([loss.measured(present).unit])[0]
        self.decay = DECAYS[0]

    def start(self) -> Tensor:
        """The present heads."""
        return torch.zeros(sum(h.size for h in self.heads.values()), dtype=torch.float64)

    def values(self, point: Tensor, part: float = 1.0) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Weights and biases at a point; of the weights' way there, a part, at the same mean output."""
        return {
            n: self.heads[n].value(part * c, beta) for n, (c, beta) in self._parts(point).items()
        }

    def __call__(self, point: Tensor) -> tuple[float, Tensor]:
        """Value and gradient, those of the first process on all of them."""
        sums, gradients = self.loss.sums(self.values(point))
        value, found = torch.tensor([sums], dtype=torch.float64), []
        penalty = 0.0
        for name, (c, _) in self._parts(point).items():
            head = self.heads[name]
            weight, bias = gradients[name]
            along, free = head.gradient(weight, bias)
            strength = self.decay * head.decay
            penalty += strength / 2 * float(c.square().sum())
            found += [along.flatten(), free]
        every = summed(torch.cat([value, *found])) / self.unit
        gradient, first = every[1:], 0
        for name, (c, _) in self._parts(point).items():
            head = self.heads[name]
            entries = gradient[first : first + c.numel()].view_as(c)
            entries += self.decay * head.decay * c
            entries *= head.scales(self.decay)
            first += head.size
        every[0] += penalty
        collectives.broadcast([every], 0)
        return float(every[0]), gradient

    def at_decay(self, point: Tensor, decay: float) -> Tensor:
        """The same heads in the coordinates of another decay, which is the one from now on."""
        moved = []
        for name, (c, beta) in self._parts(point).items():
            moved += [(c / self.heads[name].scales(decay)).flatten(), beta]
        self.decay = decay
        return torch.cat(moved)

    def _parts(self, point: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        found, first = {}, 0
        for name, head in self.heads.items():
            own = point[first : first + head.size]
            first += head.size
            rows, width = head.weight.shape[0], len(head.variances)
            c = own[: rows * width].view(rows, width) * head.scales(self.decay)
            found[name] = c, own[rows * width :]
        return found


def fit_heads(
    subject: Subject,
    heads: Mapping[str, nn.Linear],
    present: Values,
    fitted_on: Sequence[Batch],
    held_back: Sequence[Batch],
    *,
    part: float = 1.0,
    decays: Sequence[float] = DECAYS,
    tolerance: float = 1e-4,
) -> HeadFit | None:
    """Fit heads on some sequences, and measure them on others; the model is as it was afterwards.

    Args:
        subject: the model, and how its loss is taken.
        heads: its own layers by name.
        present: the weights and biases that they have, or that an adapter's copies have in their place.
        fitted_on: this process's batches.
        held_back: likewise, of other sequences.
        part: of the way from the present weights to the fitted ones that is gone.
        decays: to try, strongest first; the search ends where two in a row are worse.
        tolerance: of the gradient's entries, where all curvatures are about one.

    Returns:
        What was fitted, on every process the same; None where the loss is not one of the heads alone.
    """
    with measuring(subject.model):
        losses: list[HeadLoss] = []
        reason = ""
        with collectives.shared_errors():
            try:
                losses = [HeadLoss(subject, heads, part) for part in (fitted_on, held_back)]
            except CannotRunAlone as error:
                reason = str(error)
        if collectives.any_process(len(losses) < 2):
            logger.info("the heads cannot be fitted by themselves: %s", reason or "see the others")
            return None
        objective = HeadObjective(losses[0], present)
        if not objective.heads:
            return None
        return _chosen(objective, losses[1], present, part, decays, tolerance)


def _chosen(
    objective: HeadObjective,
    held_back: HeadLoss,
    present: Values,
    part: float,
    decays: Sequence[float],
    tolerance: float,
) -> HeadFit:
    before = held_back.measured(present)
    total = collectives.sum_counts([float(before.losses.double().sum()), before.unit])
    point = objective.at_decay(objective.start(), decays[0])
    best: tuple[float, Gain, Tensor] | None = None
    worse = 0
    for decay in decays:
        point = minimize(objective, objective.at_decay(point, decay), tolerance=tolerance)
        collectives.broadcast([point], 0)
        found = _gain(before, held_back, present, objective.values(point))
        if best is None or found.mean > best[1].mean:
            best, worse = (decay, found, point), 0
        else:
            worse += 1
        if worse == 2:
            break
    assert best is not None
    decay, found, point = best
    objective.decay = decay
    kept = found.mean > found.error
    values = objective.values(point, part) if kept else {}
    taken = found if part == 1.0 or not kept else _gain(before, held_back, present, values)
    loss = total[0] / max(total[1], 1.0)
    return HeadFit(values, found, loss, loss - taken.mean, decay, tuple(objective.heads))


def _gain(before: SequenceLosses, held_back: HeadLoss, present: Values, values: Values) -> Gain:
    return gain(before, held_back.measured({**present, **values}))
