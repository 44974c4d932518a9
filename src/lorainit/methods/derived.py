"""What the pipeline asks of a method whose start is another method's, changed."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from lorainit.types import Factors, Method


@runtime_checkable
class Derived(Method, Protocol):
    """A method whose start is another's, changed layer by layer once it is found and measured."""

    @property
    def like(self) -> Method:
        """The other method, which is started whole: lengths, ranks and refusal are its own."""

    def derived(self, start: Factors, weight: Tensor) -> Factors:
        """A layer's factors from the other's, given the weight ``(..., out, in)``."""
