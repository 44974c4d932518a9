"""Hooks on the target layers: what goes in on the forward pass, what comes back on the backward.

A tap is an identity on the layer's output whose backward sees the output's gradient together with
the saved input. Saving goes through autograd, so gradient checkpointing drops and recomputes the
input as it does every other one, and each call counts exactly once: a recomputed forward has no
backward of its own. No weight needs a gradient, so weights may be frozen, quantized or sharded.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.errors import DataError
from lorainit.linalg import all_finite
from lorainit.models.convolution import Convolution
from lorainit.models.embedding import Lookup
from lorainit.models.experts import ExpertLayer, routed
from lorainit.models.forms import Form, form_of
from lorainit.models.hooks import add_hook
from lorainit.models.reference_forward import in_reference_forward
from lorainit.statistics.collect.accumulators import InputSums, LayerSums
from lorainit.statistics.positions.after_convolution import after_convolution
from lorainit.statistics.positions.calls import InputPositions
from lorainit.statistics.positions.model_calls import ModelCalls
from lorainit.statistics.positions.noted import NotedPositions
from lorainit.types import GRADIENT_STATISTICS, OF_INPUT, GradientDtype


@dataclass(eq=False)
class _InputTensor:
    """A tensor that arrived at one or more layers in one forward pass, and whose sums count it."""

    tensor: weakref.ref[Tensor]
    version: int
    sums: InputSums
    positions: InputPositions
    opens: bool
    layers: set[str]
    rows: tuple[Tensor, int] | None = None
    form: Form | None = None
    counted: bool = False


@dataclass(eq=False)
class HookState:
    """What the hooks share: sums by layer, and the batch that is under way.

    Attributes:
        needs: names of the statistics to collect.
        layers: running sums by target name.
        calls: of the model's parts, which say what positions count.
        share_inputs: let layers that read the same tensor share one sum.
        counts: whether the batch counts at all; if not, it only keeps other processes company.
        unknown: shapes of inputs by layer, where the batch is padded and no mask says where.
        gradient_dtype: what gradients are added up in.
        apart: layers of which nothing can be known sequence by sequence, with the reason.
        dtype: what the model computes in.
        ran: names of the layers that were called, with a gradient or without.
        ran_in_batch: whether any was in the batch under way.
        deferred: the block under way runs again later: which positions its layers read is noted, no more.
        notes: these positions by layer, in the order of the calls.
    """

    needs: frozenset[str]
    layers: dict[str, LayerSums]
    calls: ModelCalls | NotedPositions
    share_inputs: bool = True
    counts: bool = True
    _reads: list[_InputTensor] = field(default_factory=list)
    _met: set[str] = field(default_factory=set)
    unknown: dict[str, tuple[int, ...]] = field(default_factory=dict)
    gradient_dtype: GradientDtype = "float32"
    apart: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    ran: set[str] = field(default_factory=set)
    ran_in_batch: bool = False
    deferred: bool = False
    notes: dict[str, list[InputPositions]] = field(default_factory=dict)

    @property
    def backward(self) -> bool:
        """Whether any statistic needs a backward pass."""
        return bool(self.needs & GRADIENT_STATISTICS)

    @property
    def keeps_input(self) -> bool:
        """Whether the backward needs the layer's input."""
        return bool(self.needs & {"gradient", "input_second_moment", "input_mean"})

    @property
    def arrived_at(self) -> frozenset[str]:
        """Names of the layers whose inputs were looked at, counted or not."""
        return frozenset(self._met)

    def begin_batch(
        self, batch: Mapping[str, Any], moved: Mapping[str, Any], *, counted: bool = True
    ) -> None:
        """Forget the tensors of the batch before.

        Args:
            batch: the next one, as it arrived.
            moved: the same on the model's device.
            counted: whether it counts.
        """
        self.calls.begin_batch(batch, moved)
        self.counts = counted
        self.ran_in_batch = False
        self.notes = {}
        self._reads.clear()

    def run_again(self, notes: Mapping[str, list[InputPositions]]) -> None:
        """Layers of another batch run again, at the positions that were noted of them."""
        self.calls = NotedPositions(notes)
        self._reads.clear()

    def arrived(
        self,
        name: str,
        x: Tensor,
        rows: tuple[Tensor, int] | None = None,
        form: Form | None = None,
    ) -> _InputTensor:
        """Note that layer `name` reads `x`, at `rows` of the model's positions, and which sums count it.

        Convolutions share an input where they read the same patches of it.

        A layer that on its very first call reads a tensor that another layer's very first call read
        joins its sums. From then on they are expected to read the same tensors; `sharing_held`
        checks it at the end. A layer that reads one tensor twice counts it twice.
        """
        self._reads = [read for read in self._reads if read.tensor() is not None]
        layer = self.layers[name]
        first = name not in self._met
        self._met.add(name)
        for read in self._reads:
            if read.tensor() is not x or read.version != x._version or name in read.layers:
                continue
            if read.form != form:
                continue
            if first and self.share_inputs and read.opens:
                layer.inputs = read.sums
            if read.sums is layer.inputs:
                read.layers.add(name)
                return read
        positions = self.calls.of_input(name, _by_positions(x, form))
        if isinstance(form, Convolution):
            batch, *size, _ = form.positions(x).shape
            positions = after_convolution(positions, form, tuple(size), batch)
        read = _InputTensor(
            weakref.ref(x), x._version, layer.inputs, positions, first, {name}, rows, form
        )
        self._reads.append(read)
        return read

    def count(self, name: str, read: _InputTensor, x: Tensor | None, g: Tensor | None) -> None:
        """Add one call of layer `name`: its input, and its output gradient where there is one."""
        if not self.counts:
            return
        layer = self.layers[name]
        operand = x if x is not None else g
        assert operand is not None
        form = read.form
        leading = operand.shape[:-1] if form is None else torch.Size(form.leading(x, g))
        indices, known = None, True
        if read.positions.mask is not None:
            indices, known = read.positions.mask.indices_for(leading, read.rows)
        if not (known and read.positions.known):
            self.unknown.setdefault(name, tuple(operand.shape))
        layer.positions += leading.numel() if indices is None else indices.numel()
        new, read.counted = not read.counted and x is not None, read.counted or x is not None
        first = 0
        for some_x, some_g in [(x, g)] if form is None else form.rows(x, g):
            flat_x, flat_g = (
                None if t is None else t.reshape(-1, t.shape[-1]) for t in (some_x, some_g)
            )
            if "gradient" in self.needs and flat_g is not None and flat_x is not None:
                there = flat_x.to(flat_g.device)
                if isinstance(form, Lookup):
                    layer.add_words(flat_g, there.squeeze(1), form.words, self.gradient_dtype)
                else:
                    layer.add_gradient(flat_g, there, self.gradient_dtype)
            own = indices
            if form is not None and indices is not None:
                either = flat_g if flat_x is None else flat_x
                count = 0 if either is None else len(either)
                own = indices[(indices >= first) & (indices < first + count)] - first
                first += count
            if flat_g is not None:
                layer.add_output(_rows(flat_g, own), self.needs)
            if isinstance(form, Lookup):
                if flat_x is not None and new and self.needs & OF_INPUT:
                    read.sums.add_words(_rows(flat_x, own).squeeze(1), form.words, self.dtype)
            elif flat_x is not None and new:
                if read.sums.second_moment is not None:
                    flat_x = flat_x.to(read.sums.second_moment.device)
                read.sums.add(_rows(flat_x, own), self.needs)

    def by_rows(self, name: str, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Words and their rows, sequence by sequence: what is looked up once for all is repeated for each.

        A table of positions, say, is; of any other lookup that is not one a sequence nothing can be known.
        """
        rows = self.calls.rows()
        if rows is None or x.dim() == 0 or x.shape[0] == rows:
            return x, output
        if x.dim() == 2 and x.shape[0] == 1:
            shape = rows, *output.shape[1:]
            return x.expand(rows, -1), output.expand(shape) if self.backward else output
        self.apart[name] = "it looks up what all sequences of a batch share"
        self.layers[name] = LayerSums()
        return x, output

    def tensors(self) -> list[Tensor]:
        """All sums so far, shared ones once."""
        found = {
            id(tensor): tensor
            for layer in self.layers.values()
            for tensor in (
                layer.gradient,
                layer.output_second_moment,
                layer.output_squares,
                layer.inputs.second_moment,
                layer.inputs.total,
                layer.inputs.counts,
            )
            if tensor is not None
        }
        return list(found.values())

    def finite(self) -> bool:
        """Whether all sums so far are finite."""
        return all(bool(all_finite(tensor)) for tensor in self.tensors())

    def sharing_held(self) -> bool:
        """Whether every layer read every input that its shared sums counted."""
        return all(
            layer.positions == layer.inputs.positions
            for layer in self.layers.values()
            if layer.inputs.positions
        )


def _rows(flat: Tensor, indices: Tensor | None) -> Tensor:
    return flat if indices is None else flat.index_select(0, indices.to(flat.device))


def _by_positions(x: Tensor, form: Form | None) -> Tensor:
    """The input with its positions first."""
    return x if form is None else form.positions(x)


class _CaptureGradient(torch.autograd.Function):
    """Identity on a layer's output; its backward adds the call to the running sums."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor | None,
        anchor: Tensor,
        state: HookState,
        name: str,
        read: _InputTensor,
    ) -> Tensor:
        ctx.mark_dirty(output)
        ctx.save_for_backward(*([] if x is None else [x]))
        ctx.call = (state, name, read)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        state, name, read = ctx.call
        # Read once: checkpointing without reentry recomputes for one read, and forbids another.
        saved = ctx.saved_tensors
        x = saved[0] if saved else None
        with torch.autocast(g.device.type, enabled=False):
            state.count(name, read, x, g.detach())
        return g, None, None, None, None, None


@contextmanager
def hooks_on(state: HookState, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Hooks on `modules` (by target name) for the time of the context, removed whatever happens."""
    # An input that requires a gradient makes autograd follow the outputs of frozen layers.
    anchor = torch.zeros((), requires_grad=True)

    def make_hook(name: str) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            if in_reference_forward():
                return None
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if not isinstance(x, Tensor) or not isinstance(output, Tensor):
                raise DataError(
                    f"layer '{name}' ({type(module).__name__}) does not map one tensor to one "
                    "tensor, so "
                    "no statistics can be taken of it. Leave it out with exclude_modules."
                )
            state.ran.add(name)
            state.ran_in_batch = True
            form = form_of(module)
            if isinstance(form, Lookup):
                x, output = state.by_rows(name, x, output)
            if name in state.apart:
                return None
            if state.deferred:
                positions = state.calls.of_input(name, _by_positions(x, form))
                state.notes.setdefault(name, []).append(positions)
                return None
            rows = module.rows if isinstance(module, ExpertLayer) else None
            if not state.backward:
                with torch.autocast(x.device.type, enabled=False):
                    read = state.arrived(name, x, rows, form)
                    state.count(name, read, x.detach(), None)
                return None
            if not torch.is_grad_enabled():
                # The discarded forward of reentrant checkpointing; the recomputed one will come.
                state.calls.note_discarded(name, _by_positions(x, form))
                return None
            read = state.arrived(name, x, rows, form)
            saved = x.detach() if state.keeps_input else None
            if output._is_view():
                # Of a quantized layer's own autograd function, say, whose views stay untouched.
                output = output.clone()
            return _CaptureGradient.apply(output, saved, anchor, state, name, read)  # type: ignore[no-untyped-call]

        return hook

    with ExitStack() as stack:
        stack.enter_context(routed(modules.values()))
        stack.enter_context(state.calls.hooked())
        for name, module in modules.items():
            add_hook(stack, module.register_forward_hook, make_hook(name), with_kwargs=True)
        yield
