"""The mask that each part of a model was called with: which positions of a layer's input count.

Masks are read where the model's own forward is called, whatever the batch calls them: a pre-hook on the
model and on each transformers model inside of it (encoder, decoder, vision tower). A layer belongs to the
innermost part that is running. What it reads is that part's, unless it is the output of another: keys and
values of a cross-attention read the encoder, a head reads the model below it, a projector the vision tower.
Outputs are followed by their storage, not by their shape.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.models.hooks import add_hook
from lorainit.models.introspection import blocks_with_masks, innermost_model, is_part
from lorainit.statistics.positions.call_tensors import (
    address,
    arguments_of,
    is_length_first,
    output_tensors,
    same_memory,
    tensor_pairs,
)
from lorainit.statistics.positions.calls import Call, InputPositions, KnownMasks, Output
from lorainit.statistics.positions.counted import (
    CountedPositions,
    attends_to_itself,
    label_positions,
    positions_of,
    steps_of,
    up_to_the_last_label,
)
from lorainit.statistics.positions.other_lengths import of_other_length
from lorainit.types import TokenMask

_TEXT = ("input_ids", "inputs_embeds")
_MASKS = ("attention_mask", "pixel_attention_mask", "input_features_mask", "mask")


class ModelCalls:
    """The parts of a model that are running, and the masks that they were called with."""

    def __init__(self, model: nn.Module, token_mask: TokenMask, device: torch.device) -> None:
        self.model = model
        self.base = innermost_model(model)
        self.token_mask = token_mask
        self.device = device
        self._batch: Mapping[str, Any] = {}
        self._labels: CountedPositions | None = None
        self._hosts: dict[int, Tensor] = {}
        self._padded = False
        self._masks = KnownMasks()
        self._running: list[Call] = []
        self._outputs: dict[int, Output] = {}
        self._discarded: dict[str, list[InputPositions]] = {}

    def begin_batch(self, batch: Mapping[str, Any], moved: Mapping[str, Any]) -> None:
        """Another batch.

        Args:
            batch: as it arrived: masks are read here, so that nothing waits for a device.
            moved: the same on the model's device.

        Raises:
            DataError: ``token_mask="labels"``, and labels that are not a causal language model's.
        """
        self._batch = batch
        self._running.clear()
        self._outputs.clear()
        self._discarded.clear()
        self._masks.clear()
        pairs = [
            (key, host, there) for key, host, there in tensor_pairs(batch, moved) if host.dim()
        ]
        self._hosts = {there.data_ptr(): host for _, host, there in pairs}
        self._padded = any(
            key.endswith("attention_mask") and host.dim() == 2 and not bool(host.all())
            for key, host, _ in pairs
        )
        self._labels = None
        if self.token_mask == "labels":
            self._labels = label_positions(self.model, batch, self.device)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the model's parts for the time of the context."""
        with ExitStack() as stack:
            stack.callback(self._running.clear)
            stack.callback(self._outputs.clear)
            stack.enter_context(self._with_direct_calls())
            inner = (m for m in self.base.modules() if m is self.base or is_part(m))
            for modules, enter, leave in (
                (inner, self._enter, self._leave),
                (blocks_with_masks(self.base), self._enter_block, self._leave_block),
            ):
                for module in modules:
                    add_hook(stack, module.register_forward_pre_hook, enter, with_kwargs=True)
                    add_hook(stack, module.register_forward_hook, leave)
            yield

    @contextmanager
    def _with_direct_calls(self) -> Iterator[None]:
        """``model.forward(...)``, which PEFT and sentence-transformers call, runs the model's hooks too."""
        base = self.base
        if hasattr(base, "unshard"):
            # Its hooks gather weights; whoever goes round them has done that.
            yield
            return
        own, forward = vars(base).get("forward"), base.forward

        @wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            entered = bool(self._running) and self._running[-1].module is base
            return forward(*args, **kwargs) if entered else base(*args, **kwargs)

        vars(base)["forward"] = called
        try:
            yield
        finally:
            del vars(base)["forward"]
            if own is not None:
                vars(base)["forward"] = own

    def rows(self) -> int | None:
        """Sequences or samples of the part that is running; None where that is not known."""
        tokens = self._running[-1].tokens if self._running else None
        known = tokens is not None and (self._running[-1].shape is not None or tokens.dim() > 2)
        return tokens.shape[0] if known and tokens is not None else None

    def of_input(self, name: str, x: Tensor) -> InputPositions:
        """Which positions of what layer `name` reads now count."""
        if not self._running:
            # Reentrant checkpointing runs a layer again after the model has returned.
            discarded = self._discarded.get(name)
            return discarded.pop() if discarded else self._of_batch()
        call = self._running[-1]
        found = self._in_call(call, x)
        shape = call.shape if found.mask is None else found.mask.shape
        turned = shape is not None and is_length_first(x, shape[0], shape[1])
        if found is call.found:
            rows_first = x.transpose(0, 1) if turned else x
            found = of_other_length(call, rows_first, self._masks, self.device)
        if turned and found.mask is not None:
            found = InputPositions(found.mask.length_first, found.known)
        return found

    def note_discarded(self, name: str, x: Tensor) -> None:
        """Layer `name` runs in a forward that will be run again for its backward."""
        if self._running:
            self._discarded.setdefault(name, []).append(self.of_input(name, x))

    def _in_call(self, call: Call, x: Tensor) -> InputPositions:
        output = self._output_of(x)
        if output is not None:
            return output.found
        if call.last is None:
            return call.found
        if call.last.found.mask is not None or call.found.mask is None:
            return call.last.found
        # After a part without a mask (images): what is made of its output has a share of its positions,
        # or at least no more of them, and does not lie like the text.
        count, text = x.shape[:-1].numel(), call.found.mask
        share = count > 0 and call.last.count % count == 0
        fewer = count <= call.last.count and text.lying_like(x.shape[:-1]) is None
        return call.last.found if share or fewer else call.found

    def _output_of(self, x: Tensor) -> Output | None:
        """The part's output that a tensor is, or is a view of."""
        output = self._outputs.get(address(x))
        return output if output is not None and output.tensor() is not None else None

    # --- calls of parts

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = arguments_of(module, args, kwargs)
        text = next((a for n in _TEXT if isinstance(a := arguments.get(n), Tensor)), None)
        tokens = text
        if tokens is None:
            tokens = next((a for a in arguments.values() if isinstance(a, Tensor)), None)
        shape = None if text is None else tuple(text.shape[:2])
        call = Call(module, arguments, tokens, shape)
        outer = self._running[-1] if self._running else None
        call.found = self._found(call, outer)
        self._note_source(call, outer)
        self._running.append(call)

    def _leave(self, module: nn.Module, args: object, output: Any) -> None:
        while self._running and self._running[-1].module is not module:
            self._running.pop()
        if not self._running:
            return
        call = self._running.pop()
        if not self._running:
            self._outputs.clear()
            return
        tensors = list(output_tensors(output))
        if not tensors:
            return
        first = tensors[0]
        found = self._in_call(call, first)
        last = Output(weakref.ref(first), found, first.shape[:-1].numel())
        self._running[-1].last = last
        for tensor in tensors:
            if self._output_of(tensor) is None:
                self._outputs[address(tensor)] = Output(weakref.ref(tensor), found, last.count)

    def _enter_block(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._running:
            self._running[-1].blocks.append((module, args, kwargs))

    def _leave_block(self, module: nn.Module, args: object, output: object) -> None:
        blocks = self._running[-1].blocks if self._running else []
        while blocks and blocks.pop()[0] is not module:
            pass

    # --- masks

    def _found(self, call: Call, outer: Call | None) -> InputPositions:
        """Which of a call's positions count."""
        arguments = call.arguments
        mask = next((m for n in _MASKS if (m := arguments.get(n)) is not None), None)
        choices = isinstance(ids := arguments.get("input_ids"), Tensor) and ids.dim() == 3
        if isinstance(mask, Tensor) and (mask.dim() == 2 or (mask.dim() == 3 and choices)):
            return InputPositions(self._of_mask(mask, call))
        if outer is not None and same_memory(call.tokens, outer.tokens):
            return outer.found
        if isinstance(arguments.get("encoder_hidden_states"), Tensor):
            return self._of_decoder(call)
        if outer is not None and call.shape is not None and call.shape == outer.shape:
            # Given a mask that is made of the outer one, or none since the outer one masks nothing.
            return outer.found
        if isinstance(mask, Tensor) and mask.dim() in (3, 4):
            return InputPositions(positions_of(attends_to_itself(self._host(mask)), self.device))
        if outer is None and self._labels is not None:
            return InputPositions(self._labels)
        return InputPositions(None, known=not (outer is None and self._padded and mask is None))

    def _of_mask(self, mask: Tensor, call: Call) -> CountedPositions:
        found = self._masks.get(mask, mask.shape)
        if found is None:
            shorter = partial(steps_of, self.base) if call.shape is None else None
            found = positions_of(self._host(mask), self.device, shorter)
            self._masks.keep(mask, mask.shape, found)
        labels = self._labels
        return labels if labels is not None and labels.shape == found.shape else found

    def _of_decoder(self, call: Call) -> InputPositions:
        """A decoder without a mask: its ids are the labels, or the encoder's ids, shifted by one."""
        labels = [self._batch.get("labels"), *(c.arguments.get("labels") for c in self._running)]
        shape = call.shape or (None if call.tokens is None else tuple(call.tokens.shape[:2]))
        for some in labels:
            if not isinstance(some, Tensor) or some.is_floating_point():
                continue
            if some.dim() == 2 and tuple(some.shape) == shape:
                kept = up_to_the_last_label(self._host(some))
                return InputPositions(positions_of(kept, self.device))
        ids = call.arguments.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            return InputPositions()
        for outer in self._running:
            source = outer.arguments.get("input_ids")
            if not isinstance(source, Tensor) or source.shape != ids.shape:
                continue
            if torch.equal(source[:, :-1].to(ids.device), ids[:, 1:]):
                return outer.found
        padding = getattr(getattr(call.module, "config", None), "pad_token_id", None)
        ends = isinstance(padding, int) and ids.shape[1] > 1 and bool((ids[:, -1] == padding).any())
        return InputPositions(None, known=not ends)

    def _note_source(self, call: Call, outer: Call | None) -> None:
        """A decoder's own argument says what the encoder's positions are, if no output of a part does."""
        source = call.arguments.get("encoder_hidden_states")
        if not isinstance(source, Tensor) or self._output_of(source) is not None:
            return
        mask = call.arguments.get("encoder_attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            found = InputPositions(self._of_mask(mask, call))
        else:
            found = InputPositions() if outer is None or outer.last is None else outer.last.found
        count = source.shape[:-1].numel()
        self._outputs[address(source)] = Output(weakref.ref(source), found, count)

    def _of_batch(self) -> InputPositions:
        """A layer that runs in no part of the model: the batch's own mask, if it has one."""
        if self._labels is not None:
            return InputPositions(self._labels)
        mask = self._batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return InputPositions(positions_of(mask, self.device))
        return InputPositions(None, known=not self._padded)

    def _host(self, tensor: Tensor) -> Tensor:
        """The same numbers where they arrived, if the tensor is one of the batch's."""
        host = self._hosts.get(tensor.data_ptr())
        if host is None or host.numel() != tensor.numel() or not tensor.is_contiguous():
            return tensor
        return host.reshape(tensor.shape)
