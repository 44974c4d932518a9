"""Fused experts of a mixture: matrices stacked in one parameter, as layers that can be watched.

From transformers 5 on a mixture's experts are one module with three-dimensional parameters, computed
by one of several kernels. Inside `routed` the same products are made one expert at a time, each by a
module of its own, an `ExpertLayer`, whose calls hooks see like those of any linear layer. Outside of
it nothing is changed, and the stacked parameters stay where they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorainit.models.offload_hooks import stored_weights


class ExpertLayer(nn.Module):
    """One expert's matrix of a stacked parameter; it holds none of its own.

    Attributes:
        stack: all layers of the same module.
        parameter: name of the stacked parameter.
        index: of the expert.
        out_features: rows of the expert's matrix, as ``(out, in)``.
        in_features: its columns.
        rows: while it is called, which of the mixture's tokens its input is, and how many there are.
    """

    rows: tuple[Tensor, int] | None = None

    def __init__(self, stack: ExpertStack, parameter: str, index: int) -> None:
        super().__init__()
        # No attribute: the stack refers to the model, whose modules are not this one's.
        self._held = (stack,)
        self.parameter, self.index = parameter, index
        _, first, second = stack.shape(parameter)
        self.out_features, self.in_features = (
            (second, first) if stack.transposed else (first, second)
        )

    @property
    def stack(self) -> ExpertStack:
        """All layers of the same module."""
        return self._held[0]

    @property
    def weight(self) -> Tensor:
        """``(out, in)``, a view of the stacked parameter as it is now."""
        matrix = self.stack.whole(self.parameter)[self.index]
        return matrix.mT if self.stack.transposed else matrix

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The stacked parameter, for those who ask where the weight lies."""
        yield getattr(self.stack.owner, self.parameter)

    def forward(self, x: Tensor) -> Tensor:
        """``(tokens, in)`` to ``(tokens, out)``."""
        bias = None
        if self.stack.has_bias:
            bias = getattr(self.stack.owner, f"{self.parameter}_bias")[self.index]
        return F.linear(x, self.weight, bias)


class ExpertStack:
    """The experts of one module, as layers.

    Attributes:
        owner: the module that holds the stacked parameters.
        names: of the parameter of the first products, and of that of the second.
        layers: by parameter name, one for each expert.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.transposed: bool = owner.is_transposed  # type: ignore[assignment]
        self.has_bias: bool = owner.has_bias  # type: ignore[assignment]
        self.names = expert_parameters(owner)
        self.layers = {
            name: [ExpertLayer(self, name, i) for i in range(self.shape(name)[0])]
            for name in self.names
        }
        self._routing = False

    def shape(self, parameter: str) -> torch.Size:
        """Of a stacked parameter."""
        whole: Tensor = getattr(self.owner, parameter)
        return whole.shape

    def whole(self, parameter: str) -> Tensor:
        """The stacked parameter, fetched from where it is offloaded to, if it is."""
        found: Tensor = getattr(self.owner, parameter)
        stored = stored_weights(self.owner)
        return stored[parameter] if found.is_meta and stored is not None else found

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module computes, one expert after the other.

        Args:
            *args: ``(tokens, hidden)`` states, the ``(tokens, k)`` experts of each, and the
                ``(tokens, k)`` weights of their outputs, under the names that the module has.
            **kwargs: as `args`.
        """
        given = inspect.signature(type(self.owner).forward).bind(self.owner, *args, **kwargs)
        hidden, chosen, weights = list(given.arguments.values())[1:4]
        states = hidden.reshape(-1, hidden.shape[-1])
        chosen, weights = chosen.reshape(len(states), -1), weights.reshape(len(states), -1)
        experts = chosen.reshape(-1)
        order = experts.argsort(stable=True)
        first, second = (self.layers[name] for name in self.names)
        outputs, start = [], 0
        for index, count in enumerate(torch.bincount(experts, minlength=len(first)).tolist()):
            if count == 0:
                continue
            tokens = order[start : start + count] // chosen.shape[1]
            rows = (tokens, len(states))
            inner = self._gated(_called(first[index], states[tokens], rows))
            outputs.append(self._normed(_called(second[index], inner, rows)))
            start += count
        if not outputs:
            return torch.zeros_like(hidden)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        weighted: Tensor = torch.cat(outputs)[back] * weights.reshape(-1, 1)
        return weighted.reshape(*chosen.shape, -1).sum(1).to(hidden.dtype).reshape(hidden.shape)

    def _gated(self, values: Tensor) -> Tensor:
        act = self.owner._apply_gate if _has_gate(self.owner) else self.owner.act_fn
        inner: Tensor = act(values)  # type: ignore[operator]
        return inner

    def _normed(self, values: Tensor) -> Tensor:
        if not getattr(self.owner, "has_post_expert_norm", False):
            return values
        normed: Tensor = self.owner.post_expert_norm(values)  # type: ignore[operator]
        return normed

    @contextmanager
    def routing(self) -> Iterator[None]:
        """Let the module compute by `forward`; nothing more where it does already."""
        if self._routing:
            yield
            return
        own = vars(self.owner)
        # accelerate keeps what its hooks wrap under a name of its own.
        name = "_old_forward" if "_old_forward" in own else "forward"
        before = own.get(name)
        own[name] = self.forward
        self._routing = True
        try:
            yield
        finally:
            self._routing = False
            if before is None:
                del own[name]
            else:
                own[name] = before


@contextmanager
def routed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Calls of fused experts go through the `ExpertLayer` objects among `modules` and beside them."""
    stacks = {id(m.stack): m.stack for m in modules if isinstance(m, ExpertLayer)}
    with ExitStack() as entered:
        for stack in stacks.values():
            entered.enter_context(stack.routing())
        yield


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the two stacked parameters of fused experts, or none where they cannot be served.

    Served are modules of transformers' experts interface that are whole on this process and hold
    floating weights of two experts or more.
    """
    marks = ("is_transposed", "has_bias", "_apply_gate", "num_experts")
    if not all(hasattr(module, mark) for mark in marks):
        return ()
    if getattr(module, "_is_expert_parallel", False):
        return ()
    names = ("gate_up_proj" if _has_gate(module) else "up_proj", "down_proj")
    for name in names:
        whole = getattr(module, name, None)
        if not isinstance(whole, Tensor) or whole.dim() != 3 or whole.shape[0] < 2:
            return ()
        if not whole.is_floating_point() or whole.element_size() < 2:
            return ()
    return names


def _has_gate(module: nn.Module) -> bool:
    return bool(getattr(module, "has_gate", True))


def _called(layer: ExpertLayer, x: Tensor, rows: tuple[Tensor, int]) -> Tensor:
    layer.rows = rows
    try:
        y: Tensor = layer(x)
    finally:
        layer.rows = None
    return y
