"""Random: another method's sizes with random directions, a control for what is scale.

Of this package. Zhang et al. (arXiv 2507.06558) and LoRA-alpha (arXiv 2606.12883) hold that the scale of
a start, not its directions, explains most of what published starts gain.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import product

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import TRUST_REGION
from lorainit.methods.natural import Natural
from lorainit.methods.table import STARTS
from lorainit.types import Factors, LayerStatistics, Method
from lorainit.types.numbers import require_count


@dataclass(frozen=True)
class Random:
    r"""The factors of another method, turned into random subspaces: same sizes, no direction.

    With ``A = T Q^T`` and ``B = P S`` the QR decompositions of the other method's factors, and ``Q'``
    ``(in, rank)``, ``P'`` ``(out, rank)`` random orthonormal columns::

        A' = T Q'^T,   B' = P' S

    ``A' A'^T = A A^T``, ``B'^T B' = B^T B`` and ``B' A' = P' (S T) Q'^T``: row norms of ``A``, column
    norms of ``B``, all inner products between them, and the singular values of both factors and of
    their product are the other method's. Only where the rows of ``A`` and the columns of ``B`` point
    is random. What a start gains over this is direction; what this gains over plain LoRA is scale.

    `get_peft_model` makes the other method's start whole, with its measured length, its redistributed
    ranks and its refusal (a plain start stays plain), and turns that. Anchored where the other is.

    Args:
        like: the other method, or its name or settings as `settings_of` gives them.
        seed: of the directions. A layer's own follow from it and the layer's weight, the same in
            every stack and on every device; layers of equal weights get equal directions.
    """

    like: Method = field(default_factory=Natural)
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "like", _method(self.like))
        require_count("seed", self.seed, least=-(2**53))

    @classmethod
    def paper(cls) -> Random:
        """The defaults: like `Natural`."""
        return cls()

    @property
    def needs(self) -> frozenset[str]:
        """The other method's."""
        return self.like.needs

    @property
    def rank_factor(self) -> int:
        """A layer's rank times this must not exceed ``min(out, in)``: the other method's."""
        return int(getattr(self.like, "rank_factor", 1))

    @property
    def calibrated(self) -> bool:
        """Whether the other's length is to be measured."""
        return bool(getattr(self.like, "calibrated", False))

    @property
    def trust_region(self) -> float:
        """The other's, where its length is measured."""
        return float(getattr(self.like, "trust_region", TRUST_REGION))

    @property
    def steps(self) -> int:
        """How often the other takes statistics."""
        return int(getattr(self.like, "steps", 1))

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """The other method's `solve`, turned.

        Args:
            weight: ``(..., out, in)``.
            statistics: as the other method takes them.
            rank: of the factors.
            scaling: the layer's ``s``.

        Returns:
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)``; anchored as the other method's are.
        """
        return self.changed(self.like.solve(weight, statistics, rank, scaling), weight)

    def changed(self, start: Factors, weight: Tensor) -> Factors:
        """Factors of the same sizes in random subspaces.

        Args:
            start: of one layer or a stack of layers, ``A`` ``(..., rank, in)``, ``B``
                ``(..., out, rank)``.
            weight: ``(..., out, in)``, of which a few entries decide the directions.
        """
        turned_a = _turned(start.A.mT, _directions(weight, start.A, self.seed, 0)).mT
        turned_b = _turned(start.B, _directions(weight, start.B.mT, self.seed, 1))
        return Factors(turned_a.to(start.A), turned_b.to(start.B), start.anchored)


def _turned(block: Tensor, directions: Tensor) -> Tensor:
    """``(..., n, r)``: the block's inner products, in other directions."""
    triangle = torch.linalg.qr(linalg.double_precision(block))[1]
    turned: Tensor = directions.to(triangle) @ triangle
    return turned


def _directions(weight: Tensor, like: Tensor, seed: int, which: int) -> Tensor:
    """Orthonormal columns ``(..., n, r)`` for a factor ``(..., r, n)``, float64, drawn on the CPU."""
    *batch, rank, size = like.shape
    drawn = []
    for index in product(*map(range, batch)):
        generator = torch.Generator().manual_seed(_seed_of(weight[index], seed, which))
        block = torch.randn(size, rank, generator=generator, dtype=torch.float64)
        drawn.append(torch.linalg.qr(block)[0])
    return torch.stack(drawn).reshape(*batch, size, rank)


def _seed_of(weight: Tensor, seed: int, which: int) -> int:
    """From up to 64 x 64 entries of a weight, rounded to float32."""
    rows, columns = (max(1, size // 64) for size in weight.shape)
    few = weight[::rows, ::columns].float().cpu().contiguous()
    content = few.numpy().tobytes()
    return zlib.crc32(f"{seed} {which}".encode(), zlib.crc32(content))


def _method(like: object) -> Method:
    """A method from itself, its name, or its settings."""
    by_name = STARTS | {kind.__name__: kind for kind in STARTS.values()}
    settings: dict[str, object] = {}
    name = like
    if isinstance(like, Mapping):
        settings = {key: value for key, value in like.items() if key != "method"}
        name = like.get("method")
    if isinstance(name, str):
        if name not in by_name:
            raise ValueError(f"like names no method, {name!r}. There are: {', '.join(STARTS)}.")
        kind = by_name[name]
        known = {f.name for f in fields(kind)} if is_dataclass(kind) else set()
        if unknown := sorted(set(settings) - known):
            raise ValueError(
                f"like has no setting {unknown[0]!r}: {name} has {', '.join(sorted(known))}."
            )
        found: Method = kind(**settings)
        return found
    if isinstance(like, (Random, type)) or not isinstance(like, Method):
        raise ValueError(
            f"like must be a method other than Random, its name or its settings, got {like!r}"
        )
    return like
