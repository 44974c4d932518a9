"""What the pipeline asks of methods of two kinds beside `types.RanksDirections`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from lorainit.types import Factors, LayerSpec, LayerStatistics, Method, RanksDirections


@runtime_checkable
class RanksLayers(Method, Protocol):
    """A method whose ranks follow from one number of each layer, which may read the weight."""

    @property
    def redistributes(self) -> bool:
        """Whether ranks other than the configured ones are asked for."""

    def importance(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """``(...)``, comparable across layers; `statistics` hold `needs`."""

    def ranks(
        self, importance: Mapping[str, float], layers: Mapping[str, LayerSpec]
    ) -> dict[str, int]:
        """Rank by layer name, from all layers' importance and their configured ranks."""


def redistributes(method: Method) -> bool:
    """Whether a method asks for ranks other than the configured ones."""
    if isinstance(method, RanksLayers):
        return method.redistributes
    return isinstance(method, RanksDirections) and method.rho > 1


@runtime_checkable
class Derived(Method, Protocol):
    """A method whose start is another's, changed layer by layer once it is found and measured."""

    @property
    def like(self) -> Method:
        """The other method, which is started whole: lengths, ranks and refusal are its own."""

    def derived(self, start: Factors, weight: Tensor) -> Factors:
        """A layer's factors from the other's, given the weight ``(..., out, in)``."""
