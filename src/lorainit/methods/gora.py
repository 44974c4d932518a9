"""GoRA: a random ``A``, and the ``B`` that makes their product the nearest to a gradient step.

He et al., "GoRA: Gradient-driven Adaptive Low Rank Adaptation", NeurIPS 2025, arXiv 2502.12171,
equations 5 to 10. Checked against the authors' release as read (github hhnqqq/MyTransformers, commit
4037d4d, ``common/lora_modules/gora.py`` and ``scripts/gora``), in which the factors lack the minus sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import require_number
from lorainit.methods.random_init import per_layer
from lorainit.types import Factors, LayerSpec, LayerStatistics


@dataclass(frozen=True)
class GoRA:
    r"""Least squares for a gradient step, in the span of LoRA's own random rows.

    ``A`` is LoRA's, uniform in ``+-1/sqrt(in)``. Among all ``B``, ``B A`` is nearest to ``-G`` at
    ``B = -G A^T (A A^T)^-1``, where ``B A = -G P`` with ``P`` the projector on the rows of ``A``. A
    random projector keeps ``rank / in`` of the squared norm, which the length makes up for::

        s B A = -length * sqrt(in / rank) * G A^T (A A^T)^-1 A

    so that ``|s B A|_F`` is about ``length * |G|_F``. Not anchored: the model starts displaced.

    Args:
        length: of the start, in units of ``G``; the paper's gamma. It depends on the loss reduction,
            as ``G`` does.
        rho: a layer may get up to so many times its configured rank when `get_peft_model`
            redistributes ranks; 1 keeps every rank as configured.
        least: a layer keeps at least so much of its configured rank.

    Deviations from the release: the minus sign, which its code leaves out though it measures its error
    against ``-G`` (as read, it starts uphill); ``A A^T`` is inverted by a QR decomposition of ``A``
    instead of a pseudoinverse with 1e-8 added; no search over lengths by the loss (its
    ``adaptive_lr_selection``, off by default). Ranks count ``sqrt(out + in)`` a direction, as in the
    paper; the code counts ``out + in`` unless ``gora_features_func`` says ``"sqrt"``.
    """

    length: float = 0.05
    rho: float = 4.0
    least: float = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def __post_init__(self) -> None:
        require_number("length", self.length, inclusive=False)
        require_number("rho", self.rho, above=1.0)
        require_number("least", self.least)
        if self.least > 1:
            raise ValueError(f"least must be at most 1, the configured rank, got {self.least!r}")

    @classmethod
    def paper(cls) -> GoRA:
        """The release's script for Llama 3.1 8B on MetaMathQA: length 0.05, ranks 4 to 32 for 8."""
        return cls(length=0.05, rho=4.0, least=0.5)

    @property
    def redistributes(self) -> bool:
        """Whether ranks other than the configured ones are asked for."""
        return self.rho > 1

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Draw ``A`` from torch's global generator, layer after layer, and fit ``B``.

        Args:
            weight: ``(..., out, in)``; only its shape, dtype and device are read.
            statistics: with ``gradient``.
            rank: of the factors.
            scaling: the layer's ``s``, divided out of the product; above zero.

        Returns:
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)``; not anchored.
        """
        *batch, rows, columns = weight.shape
        linalg.check_rank(rank, rows, columns)
        require_number("scaling", scaling, inclusive=False)
        dtype = linalg.compute_dtype(weight, statistics)
        gradient = linalg.check_finite(statistics.gradient.to(dtype), "the gradient")

        def draw() -> tuple[Tensor]:
            a = torch.empty(rank, columns, dtype=dtype).uniform_(-1, 1)
            return (a / columns**0.5,)

        (a,) = per_layer(batch, draw)
        a = a.to(gradient.device)
        # A^T = Q R: A^T (A A^T)^-1 = Q R^-T.
        q, r = torch.linalg.qr(a.mT)
        projected = gradient @ q
        fitted = torch.linalg.solve_triangular(r.mT, projected, upper=False, left=False)
        b = fitted * (-self.length * (columns / rank) ** 0.5 / scaling)
        return Factors(a.to(weight.device), b.to(weight.device), anchored=False)

    def importance(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """Mean of ``|W * G|`` over a layer's entries, ``(...)`` (equation 5).

        Args:
            weight: ``(..., out, in)``.
            statistics: with ``gradient``.
        """
        gradient = linalg.check_finite(statistics.gradient, "the gradient")
        product = linalg.check_finite(weight, "the weight").to(gradient) * gradient
        return product.abs().mean((-2, -1))

    def ranks(
        self, importance: Mapping[str, float], layers: Mapping[str, LayerSpec]
    ) -> dict[str, int]:
        """The paper's ranks (equations 6 to 8): a budget, shared out by importance.

        With ``c_l = sqrt(out + in)`` and the importance's shares ``p_l`` a layer gets the rank
        ``p_l sum_k(c_k r_k) / c_l``, rounded, between `least` and `rho` times its own ``r_l``.

        Args:
            importance: `importance` by layer name.
            layers: of the same layers, at the ranks ``r_k`` that make the budget.

        Returns:
            Rank by layer name, at least 1 and at most ``min(out, in)``.
        """
        cost = {n: (spec.out_features + spec.in_features) ** 0.5 for n, spec in layers.items()}
        budget = sum(cost[name] * spec.rank for name, spec in layers.items())
        total = sum(importance.values())
        ranks = {}
        for name, spec in layers.items():
            share = importance[name] / total if total > 0 else 1 / len(layers)
            most = min(int(self.rho * spec.rank), spec.out_features, spec.in_features)
            wanted = round(share * budget / cost[name])
            ranks[name] = max(1, min(most, max(wanted, round(self.least * spec.rank))))
        return ranks
