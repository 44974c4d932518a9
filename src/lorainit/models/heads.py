"""Heads of a model run alone: what comes before them is computed once, and stands still afterwards.

A head is a linear layer whose outputs are the logits, or what the logits are picked from. Once a batch has
run, `HeadRun` runs the model's own forward again from the heads on: every other module with weights gives
an empty tensor of the shape that it gave, and the heads give what they are told to. So any loss that the
model or the user takes can be followed as a function of the heads' outputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Values = Mapping[str, tuple[Tensor, Tensor | None]]
"""``(out, in)`` weight and ``(out,)`` bias of each head, by name."""


class CannotRunAlone(Exception):
    """The heads of this model cannot be run without what comes before them."""


@contextmanager
def heads_replaced(heads: Mapping[str, nn.Module], values: Values) -> Iterator[None]:
    """Heads compute with other weights inside the context; their own stay as they are, to the bit."""

    def make_hook(weight: Tensor, bias: Tensor | None) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            x = _input(args, kwargs)
            return F.linear(x, weight.to(x), None if bias is None else bias.to(x))

        return hook

    with ExitStack() as stack:
        for name, (weight, bias) in values.items():
            handle = heads[name].register_forward_hook(make_hook(weight, bias), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@dataclass(eq=False)
class HeadRun:
    """One batch's forward, to be run again from its heads on.

    Attributes:
        inputs: of each head that ran, ``(..., in)``.
        given: what every other module gave, call by call, by position among `still_modules`.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    given: dict[int, list[Any]] = field(default_factory=dict)

    @contextmanager
    def recording(
        self, heads: Mapping[str, nn.Module], still: Sequence[nn.Module]
    ) -> Iterator[None]:
        """Inside, one forward of the model as it is; `still` are its `still_modules`."""

        def of_head(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def recorded(*args: Any, **kwargs: Any) -> Any:
                if name in self.inputs:
                    raise CannotRunAlone(f"'{name}' runs several times in one forward")
                self.inputs[name] = _input(args, kwargs).detach()
                return forward(*args, **kwargs)

            return recorded

        def of_other(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def recorded(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                self.given.setdefault(index, []).append(_hollow(output))
                return output

            return recorded

        with ExitStack() as stack:
            for name, head in heads.items():
                stack.enter_context(_with_forward(head, of_head(name, head.forward)))
            for index, module in enumerate(still):
                stack.enter_context(_with_forward(module, of_other(index, module.forward)))
            yield

    @contextmanager
    def replaying(
        self,
        heads: Mapping[str, nn.Module],
        still: Sequence[nn.Module],
        outputs: Mapping[str, Tensor],
    ) -> Iterator[None]:
        """Inside, one forward of the same batch: heads give `outputs`, `still` what they gave, empty."""

        def of_head(name: str) -> Callable[..., Any]:
            return lambda *args, **kwargs: outputs[name]

        def of_other(index: int) -> Callable[..., Any]:
            left = iter(self.given.get(index, ()))

            def replayed(*args: Any, **kwargs: Any) -> Any:
                try:
                    return next(left)
                except StopIteration:
                    raise CannotRunAlone("the second forward is not the first one") from None

            return replayed

        with ExitStack() as stack:
            for name, head in heads.items():
                stack.enter_context(_with_forward(head, of_head(name)))
            for index, module in enumerate(still):
                stack.enter_context(_with_forward(module, of_other(index)))
            yield


def still_modules(model: nn.Module, heads: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The largest modules with weights that hold no head: what need not run again."""
    wanted = {id(head) for head in heads.values()}
    found: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if id(child) in wanted:
                continue
            # A list of modules is not called itself.
            called = type(child).forward is not nn.Module.forward
            if called and not any(id(part) in wanted for part in child.modules()):
                if next(child.parameters(), None) is not None:
                    found[id(child)] = child
            else:
                visit(child)

    visit(model)
    return list(found.values())


@contextmanager
def _with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module)
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    x = args[0] if args else kwargs.get("input")
    assert isinstance(x, Tensor)
    return x


def _hollow(output: Any) -> Any:
    """The same with one zero for all entries of every floating tensor, which takes no memory."""

    def hollow(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach()
        return tensor.detach().new_zeros(()).expand(tensor.shape)

    return tree_map_only(Tensor, hollow, output)
