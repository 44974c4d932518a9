"""Several LoRA adapters of one shape over one frozen base: flat weights, views, and the product.

An anchored start ``W x + s (B A - B0 A0) x`` is an adapter of twice the rank whose second half,
``(A0, -B0)``, is frozen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Start:
    """One adapter's factors by layer name: ``A`` ``(r, in)``, ``B`` ``(out, r)`` and the anchor.

    `extras` are other weights that are trained along with them, a classifier's head. `ratio` is the
    adapter's scaling over that of the stack that it is trained in, of an adapter that was resized.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    anchors: Mapping[str, tuple[Tensor, Tensor]]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    ratio: float | None = None

    @property
    def resized(self) -> bool:
        return self.ratio is not None

    @property
    def anchored(self) -> bool:
        return bool(self.anchors)

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        return max(a.shape[0] for a, _ in self.factors.values())


class Group:
    """The layers that read one tensor: views into the flat buffers of all adapters.

    Attributes:
        names: of the layers, in the order of the base product's columns.
        spans: the columns of each.
        A: ``(E, layers * k, in)``.
        B: one ``(E, k, out)`` a layer, transposed against PEFT's.
        scaling: ``s``.
        ratios: ``(E, 1, 1)``, times `scaling`; None where all are 1.
    """

    def __init__(self, names: list[str], widths: list[int], inputs: int) -> None:
        self.names, self.widths, self.inputs = names, widths, inputs
        edges = [sum(widths[:i]) for i in range(len(widths) + 1)]
        self.spans = list(itertools.pairwise(edges))
        self.scaling = 1.0
        self.ratios: Tensor | None = None
        self.A: Tensor
        self.grad_A: Tensor
        self.B: list[Tensor] = []
        self.grad_B: list[Tensor] = []


class StackedLinear(torch.autograd.Function):
    """``x W^T + s (x A^T) B^T``; the adapters' gradients are written where the optimizer reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Group) -> Tensor:
        y = (x.reshape(-1, x.shape[-1]) @ weight.mT).view(*x.shape[:-1], -1)
        z = torch.bmm(x, group.A.mT)
        if group.ratios is not None:
            z.mul_(group.ratios)
        k = group.B[0].shape[1]
        for i, (low, high) in enumerate(group.spans):
            y[..., low:high].baddbmm_(z[..., i * k : (i + 1) * k], group.B[i], alpha=group.scaling)
        ctx.save_for_backward(x, z)
        ctx.weight, ctx.group = weight, group
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, z = ctx.saved_tensors
        group: Group = ctx.group
        dy = dy.contiguous()
        k, s = group.B[0].shape[1], group.scaling
        dz = torch.empty_like(z)
        for i, (low, high) in enumerate(group.spans):
            part, out = dy[..., low:high], dz[..., i * k : (i + 1) * k]
            torch.baddbmm(out, part, group.B[i].mT, beta=0, alpha=s, out=out)
            gradient = group.grad_B[i]
            zi = z[..., i * k : (i + 1) * k].mT
            torch.baddbmm(gradient, zi, part, beta=0, alpha=s, out=gradient)
        if group.ratios is not None:
            dz.mul_(group.ratios)
        torch.bmm(dz.mT, x, out=group.grad_A)
        dx = (dy.view(-1, dy.shape[-1]) @ ctx.weight).view_as(x)
        dx.baddbmm_(dz, group.A)
        return dx, None, None


def scored(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and correctness of every target, from ``(targets, classes)`` logits in order."""
    flat = targets.reshape(-1)
    losses = F.cross_entropy(logits, flat, reduction="none")
    right = logits.detach().argmax(-1) == flat
    return losses.view(targets.shape), right.view(targets.shape)


class Base(Protocol):
    """A frozen model as `Adapters` and the trainer see it."""

    dtype: torch.dtype
    device: torch.device
    shapes: list[tuple[list[str], list[int], int]]
    """Names, output widths and input width of the layers that read one tensor."""
    extras: Mapping[str, Sequence[int]]
    """Shapes of what is trained besides."""
    update: Any

    def rotation(self, length: int) -> tuple[Tensor, Tensor]: ...

    def token_losses(
        self,
        tokens: Tensor,
        positions: Tensor,
        targets: Tensor,
        adapters: Adapters,
        rotation: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]: ...


class Adapters:
    """Flat float32 weights ``(E, P)`` of all adapters, views of them for compute, and AdamW.

    Args:
        base: gives the layers' shapes.
        stack: ``E``.
        rank: rows of the trained half; layers of a lower rank are padded with zeros, which stay.
        anchored: whether there is a frozen half.
        scaling: ``s``, one for the whole adapter.
        resized: whether adapters have a scaling of their own, ``Start.ratio`` times `scaling`.
    """

    def __init__(
        self,
        base: Base,
        stack: int,
        rank: int,
        *,
        anchored: bool,
        scaling: float,
        resized: bool = False,
    ) -> None:
        self.ratios = torch.ones(stack, 1, 1, device=base.device) if resized else None
        self.stack, self.rank, self.anchored = stack, rank, anchored
        k = 2 * rank if anchored else rank
        total = sum(len(n) * k * i + k * sum(w) for n, w, i in base.shapes)
        total += sum(math.prod(shape) for shape in base.extras.values())
        device = base.device
        self.weights = torch.zeros(stack, total, device=device)
        self.first = torch.zeros_like(self.weights)
        self.second = torch.zeros_like(self.weights)
        self.compute = self.weights
        if base.dtype != torch.float32:
            self.compute = self.weights.to(base.dtype)
        self.gradient = torch.zeros_like(self.compute)
        live = torch.zeros(total)
        self.groups: list[Group] = []
        self._places: dict[str, tuple[int, int, int, int]] = {}
        offset = 0
        for names, widths, inputs in base.shapes:
            group = Group(names, widths, inputs)
            group.scaling, group.ratios = scaling, self.ratios
            size = len(names) * k * inputs
            view = slice(offset, offset + size)
            group.A = self.compute[:, view].view(stack, -1, inputs)
            group.grad_A = self.gradient[:, view].view(stack, -1, inputs)
            place = offset
            offset += size
            for name, width in zip(names, widths, strict=True):
                self._places[name] = (place, inputs, offset, width)
                live[place : place + rank * inputs] = 1
                live[offset : offset + rank * width] = 1
                place += k * inputs
                view = slice(offset, offset + k * width)
                group.B.append(self.compute[:, view].view(stack, k, width))
                group.grad_B.append(self.gradient[:, view].view(stack, k, width))
                offset += k * width
            self.groups.append(group)
        self.extras: dict[str, tuple[Tensor, Tensor]] = {}
        self._extra_places: dict[str, slice] = {}
        for name, shape in base.extras.items():
            view = slice(offset, offset + math.prod(shape))
            self.extras[name] = (
                self.compute[:, view].view(stack, *shape),
                self.gradient[:, view].view(stack, *shape),
            )
            self._extra_places[name] = view
            live[view] = 1
            offset = view.stop
        self.live = live.to(device) if anchored else None

    def load(self, index: int, start: Start) -> None:
        """Write one adapter's start and forget its optimizer state."""
        row = self.weights[index].zero_()
        self.first[index].zero_()
        self.second[index].zero_()
        if self.ratios is not None:
            self.ratios[index] = 1.0 if start.ratio is None else start.ratio
        for pairs, shift in ((start.factors, 0), (start.anchors, self.rank)):
            sign = -1.0 if shift else 1.0
            for name, (a, b) in pairs.items():
                at_a, inputs, at_b, width = self._places[name]
                r = a.shape[0]
                at_a, at_b = at_a + shift * inputs, at_b + shift * width
                row[at_a : at_a + r * inputs] = a.reshape(-1).to(row)
                row[at_b : at_b + r * width] = sign * b.mT.reshape(-1).to(row)
        for name, view in self._extra_places.items():
            row[view] = start.extras[name].reshape(-1).to(row)
        self.refresh()

    def factors(self, index: int, name: str) -> tuple[Tensor, Tensor]:
        """``A`` ``(rank, in)`` and ``B`` ``(out, rank)`` of one layer of one adapter, copied."""
        at_a, inputs, at_b, width = self._places[name]
        row = self.weights[index]
        a = row[at_a : at_a + self.rank * inputs].view(self.rank, inputs)
        b = row[at_b : at_b + self.rank * width].view(self.rank, width)
        return a.clone(), b.mT.clone()

    def refresh(self) -> None:
        """Round the weights to the compute dtype."""
        if self.compute is not self.weights:
            self.compute.copy_(self.weights)
