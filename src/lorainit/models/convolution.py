"""Convolutions as linear layers over unfolded inputs.

A convolution of kernel ``k`` multiplies its weight ``(out, in * k)`` with the patch of the input that each
output location reads (``torch.nn.Unfold``; Grosse, Martens, "A Kronecker-factored approximate Fisher matrix
for convolution layers", ICML 2016, arXiv 1602.01407). Every output location is a position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

MAX_WIDTH = 2**15
"""Widest patch that is served: a second moment of it takes 4 GiB in float32."""

_AT_ONCE = 2**26
"""Numbers that are unfolded at a time."""

_ALONE_FROM = 256
"""From so many locations on a sample is unfolded by itself: its patches are then multiplied without a copy."""


@dataclass(frozen=True)
class Convolution:
    """How a convolution walks over its input; equal for those that read the same patches.

    Attributes:
        kernel: its size, one number a dimension.
        stride: the same.
        dilation: the same.
        padding: as `torch.nn.functional.pad` takes it, the last dimension first.
        mode: of the padding, as there.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str

    @classmethod
    def of(cls, module: nn.Module) -> Convolution | None:
        """Of an ``nn.Conv1d`` or ``nn.Conv2d`` that `unserved` names no reason against; else None."""
        if not isinstance(module, nn.Conv1d | nn.Conv2d) or unserved(module) is not None:
            return None
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padding = tuple(module._reversed_padding_repeated_twice)
        return cls(module.kernel_size, module.stride, module.dilation, padding, mode)  # type: ignore[arg-type]

    def padded(self, x: Tensor) -> Tensor:
        """The input with its padding."""
        return F.pad(x, self.padding, mode=self.mode) if any(self.padding) else x

    def patches(self, x: Tensor) -> Tensor:
        """``(batch, channels, *size)`` to ``(batch, locations, channels * kernel)``, as a weight lies."""
        x = self.padded(x)
        geometry = [self.kernel, self.dilation, self.stride]
        if len(self.kernel) == 1:
            x, geometry = x.unsqueeze(2), [(1, *sizes) for sizes in geometry]
        kernel, dilation, stride = geometry
        return F.unfold(x, kernel, dilation, stride=stride).transpose(1, 2)

    def locations(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Output locations by dimension, of an input of so many."""
        padding = [sum(self.padding[2 * d : 2 * d + 2]) for d in range(len(size))][::-1]
        numbers = zip(size, padding, self.kernel, self.dilation, self.stride, strict=True)
        return tuple((n + p - d * (k - 1) - 1) // s + 1 for n, p, k, d, s in numbers)

    def rows(
        self, x: Tensor | None, g: Tensor | None
    ) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Inputs and output gradients as rows of a matrix product, a few samples at a time.

        Args:
            x: ``(batch, in, *size)``, or None.
            g: ``(batch, out, *size)``, or None.

        Yields:
            ``(samples, locations, in * kernel)`` and ``(samples, locations, out)``.
        """
        x, g = (None if t is None else self._in_batch(t) for t in (x, g))
        known = g if x is None else x
        count = 0 if known is None else len(known)
        step = max(1, count) if x is None else self._at_once(x)
        for first in range(0, count, step):
            own = slice(first, first + step)
            yield (
                None if x is None else self.patches(x[own]),
                None if g is None else g[own].flatten(2).transpose(1, 2),
            )

    def positions(self, x: Tensor) -> Tensor:
        """The input as ``(batch, *size, in)``, a view, so that its positions lie as a sequence's do."""
        return self._in_batch(x).movedim(1, -1)

    def leading(self, x: Tensor | None, g: Tensor | None) -> tuple[int, int]:
        """``(batch, locations)``, from the input or the output's gradient."""
        known = g if x is None else x
        assert known is not None
        batch, *size, _ = self.positions(known).shape
        return batch, math.prod(size if x is None else self.locations(tuple(size)))

    def _in_batch(self, x: Tensor) -> Tensor:
        """An input or output without a batch dimension as a batch of one."""
        return x.unsqueeze(0) if x.dim() == len(self.kernel) + 1 else x

    def _at_once(self, x: Tensor) -> int:
        width = x.shape[1] * math.prod(self.kernel)
        count = math.prod(self.locations(tuple(x.shape[2:])))
        return 1 if count >= _ALONE_FROM else max(1, _AT_ONCE // (width * count))

    def low_rank(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """What adding ``left right`` to the weight adds to the output.

        Args:
            x: the layer's input.
            left: ``(out, rank)``.
            right: ``(rank, in * kernel)``.
        """
        convolve = F.conv1d if len(self.kernel) == 1 else F.conv2d
        ones = (1,) * len(self.kernel)
        first = right.reshape(len(right), -1, *self.kernel)
        inner = convolve(self.padded(x), first, None, self.stride, 0, self.dilation)
        return convolve(inner, left.reshape(*left.shape, *ones))


def convolution_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(out, in * kernel)`` of a convolution that is served; None for anything else."""
    if Convolution.of(module) is None:
        return None
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    return module.out_channels, module.in_channels * math.prod(module.kernel_size)


def unserved(module: nn.Conv1d | nn.Conv2d) -> str | None:
    """Why a convolution is no linear layer over patches that could be measured; None: it is one."""
    kind = type(module).__name__
    plain = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
    same = ("forward", "_conv_forward")
    if any(getattr(type(module), name) is not getattr(plain, name) for name in same):
        return f"{kind} computes more than a convolution"
    if module.groups != 1:
        return f"{kind} in {module.groups} groups"
    if "weight" not in module._parameters:
        return f"{kind} whose weight is computed anew in every forward"
    width = module.in_channels * math.prod(module.kernel_size)
    if width > MAX_WIDTH:
        return f"{kind} with patches of {width} numbers, above the limit of {MAX_WIDTH}"
    return None
