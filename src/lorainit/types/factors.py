"""A pair of LoRA factors, and what is known of the layer that they are for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """A starting pair: the adapter adds ``scaling * B @ A`` to the layer's weight.

    Attributes:
        A: ``(..., rank, in)``.
        B: ``(..., out, rank)``.
        anchored: the frozen copy of ``(A, B)`` is subtracted in the layer's forward, so that the
            model computes at first exactly what it computed before.
    """

    A: Tensor
    B: Tensor
    anchored: bool = False

    def __getitem__(self, index: int) -> Factors:
        """One layer of a stack."""
        return Factors(self.A[index], self.B[index], self.anchored)


@dataclass(frozen=True)
class LayerSpec:
    """What is known of a target layer before any data: its shape, rank and scaling.

    Attributes:
        name: the module's dotted name in the base model.
        out_features: rows of its weight, as ``(out, in)``.
        in_features: columns of its weight.
        rank: rank of the adapter on this layer.
        scaling: ``alpha / rank``, or ``alpha / sqrt(rank)`` under rsLoRA.
        one_hot: its inputs are words (an embedding): what is known of them is one number a word.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    scaling: float
    one_hot: bool = False
