"""A model displaced by low-rank terms on some layers; its weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorainit.models.experts import routed
from lorainit.models.forms import form_of
from lorainit.models.hooks import add_hook
from lorainit.models.reference_forward import in_reference_forward


@dataclass(frozen=True, eq=False)
class LowRank:
    """``left @ right``, added to a layer's weight.

    Attributes:
        left: ``(out, rank)``.
        right: ``(rank, in)``.
    """

    left: Tensor
    right: Tensor

    def scaled(self, length: float) -> LowRank:
        """The same directions, `length` times as long."""
        return LowRank(self.left * length, self.right)


@contextmanager
def displaced(modules: Mapping[str, nn.Module], terms: Mapping[str, LowRank]) -> Iterator[None]:
    """Layers compute ``W x + left (right x)`` inside the context.

    `terms` is looked up at every call, so whoever holds it may change the displacement meanwhile;
    layers without a term compute what they always do, and so do all in a `reference_forward`. Hooks that
    are registered inside the context see the displaced output.
    """

    def make_hook(name: str) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            term = terms.get(name)
            if term is None or in_reference_forward():
                return None
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            assert isinstance(x, Tensor)
            form = form_of(module)
            if form is not None:
                return output + form.low_rank(x, term.left.to(output), term.right.to(output))
            inner = F.linear(x, term.right.to(x)).to(output)
            rank, width = inner.shape[-1], output.shape[-1]
            # Added in the product: no other tensor as large as the output.
            left = term.left.to(output).mT
            moved = torch.addmm(output.reshape(-1, width), inner.reshape(-1, rank), left)
            return moved.reshape(output.shape)

        return hook

    with ExitStack() as stack:
        stack.enter_context(routed(modules.values()))
        for name, module in modules.items():
            add_hook(stack, module.register_forward_hook, make_hook(name), with_kwargs=True)
        yield
