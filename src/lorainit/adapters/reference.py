"""The weights that a quantized base was made from, read layer by layer, and what quantization took."""

from __future__ import annotations

import logging
import statistics as stats
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorainit.adapters.targets import Target
from lorainit.adapters.tensor_sources import NamedTensors, TensorSource, named_tensors
from lorainit.adapters.weights import read_weight
from lorainit.errors import AdapterError

logger = logging.getLogger("lorainit")

_MOST = 0.8
"""``|W - Q| / |W|`` above which ``W`` is not what was quantized. Rounding of normal numbers in groups of 64
takes 0.01 at 8 bits, 0.1 at 4, 0.2 at 3, 0.45 at 2 and 0.7 at three values; of another model's weights, more
than 1."""


_LOOKED_AT = 256
"""Rows of each layer's tensor that are compared with the base's before any work."""


@dataclass(frozen=True, eq=False)
class ReferenceWeights:
    """Full-precision weights of a quantized model's targets.

    Attributes:
        tensors: where they are read from.
        places: the tensor's name by target name.
        transposed: targets whose tensor is ``(in, out)``.
        sizes: ``|W - Q| / |W|`` by target name, of the rows that were looked at.
    """

    tensors: NamedTensors
    places: Mapping[str, str]
    transposed: set[str] = field(default_factory=set)
    sizes: dict[str, float] = field(default_factory=dict)

    @property
    def taken(self) -> float:
        """The median of `sizes`: about 0.01 at 8 bits, 0.1 at 4, 0.2 at 3, 0.45 at 2."""
        return stats.median(self.sizes.values())

    @classmethod
    def of(cls, source: TensorSource, targets: Mapping[str, Target]) -> ReferenceWeights:
        """The source's weights of these targets, checked before any work: names, shapes, values.

        Of each layer a few hundred rows are read.

        Raises:
            AdapterError: a target has no tensor, one of another shape, or one that the base was not
                quantized from.
        """
        tensors = named_tensors(source)
        found = cls(tensors, _places(tensors, targets))
        found._check_shapes(targets)
        found._check_values(targets)
        return found

    def read(self, target: Target, rows: int | None = None) -> Tensor:
        """``W`` of one layer, ``(out, in)``, floating, where the source has it.

        Args:
            target: the layer.
            rows: of the tensor as it is stored, the first so many alone; None: all.

        Raises:
            AdapterError: it is of another shape, or quantized itself.
        """
        # Of a stack of experts the rows are experts.
        rows = None if target.is_expert else rows
        tensor = self.tensors.read(self.places[target.name], rows)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise AdapterError(
                f"the reference weight of layer '{target.name}' is stored as {tensor.dtype}, quantized "
                "itself: give the full-precision checkpoint."
            )
        tensor = tensor[_index_of(target)] if target.is_expert and tensor.dim() == 3 else tensor
        return tensor.mT if target.name in self.transposed else tensor

    def error(self, target: Target, weight: Tensor) -> Tensor:
        """``E = W - Q``, ``(out, in)``, where the base weight is; float32, or float64 where that is.

        Args:
            target: the layer.
            weight: ``Q``, ``(out, in)``, floating.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        # Moved as it is stored, then widened: half the bytes, and no rounding on the host.
        return self.read(target).to(weight.device).to(dtype) - weight.to(dtype)

    def _check_shapes(self, targets: Mapping[str, Target]) -> None:
        for name, target in targets.items():
            have, want = self.tensors.shape(self.places[name]), _shape(target)
            if target.is_expert and len(have) == 3:
                have = have[1:]
            # Of a square one either way may be meant: its values tell.
            if have == want[::-1] and have != want:
                self.transposed.add(name)
            elif have != want:
                raise AdapterError(
                    f"the reference weight '{self.places[name]}' has shape {have}; layer '{name}' wants "
                    f"{want}. Give the checkpoint that this model was quantized from."
                )

    def _check_values(self, targets: Mapping[str, Target]) -> None:
        sizes = self.sizes
        with torch.no_grad():
            for name, target in targets.items():
                weight = read_weight(target.module, name)
                sizes[name] = self._relative_error(target, weight)
                if sizes[name] > _MOST and weight.shape[0] == weight.shape[1]:
                    self.transposed.symmetric_difference_update({name})
                    turned = self._relative_error(target, weight)
                    if turned > _MOST:
                        self.transposed.symmetric_difference_update({name})
                    sizes[name] = min(turned, sizes[name])
        wrong = [name for name, size in sizes.items() if not size <= _MOST]
        if wrong:
            raise AdapterError(
                f"the reference weight of layer '{wrong[0]}' is not what was quantized: it differs from "
                f"the base's by {sizes[wrong[0]]:.2f} of its norm, where 2 bits explain about 0.5 "
                f"({len(wrong)} of {len(sizes)} layers). Give the checkpoint that this model was "
                "quantized from."
            )
        if not any(sizes.values()):
            raise AdapterError(
                "the reference weights are the base's own, to the bit: there is nothing to give back. "
                "Give the full-precision checkpoint, or a method that reads no reference."
            )
        logger.info(
            "reference weights of %d layers: quantization took %.2g of a weight's norm in the median, "
            "%.2g at most",
            len(sizes),
            self.taken,
            max(sizes.values()),
        )

    def _relative_error(self, target: Target, weight: Tensor) -> float:
        reference = self.read(target, _LOOKED_AT).to(weight.device).float()
        weight = weight[: reference.shape[0], : reference.shape[1]]
        norm = torch.linalg.vector_norm(reference).clamp_min(torch.finfo(torch.float32).tiny)
        return float(torch.linalg.vector_norm(reference - weight.float()) / norm)


def _shape(target: Target) -> tuple[int, int]:
    return target.spec.out_features, target.spec.in_features


def _index_of(target: Target) -> int:
    return int(target.name.rpartition(".")[2])


def _places(tensors: NamedTensors, targets: Mapping[str, Target]) -> dict[str, str]:
    """The tensor of each target: the target's own name, or one with another prefix, the same for all."""
    if tensors.names is None:
        return {name: name for name in targets}
    wanted = {n: n.rpartition(".")[0] if t.is_expert else f"{n}.weight" for n, t in targets.items()}
    names = set(tensors.names)
    for old, new in _prefixes(next(iter(wanted.values())), names):
        renamed = {
            name: new + w[len(old) :] if w.startswith(old) else w for name, w in wanted.items()
        }
        if all(place in names for place in renamed.values()):
            return renamed
    missing = [w for w in wanted.values() if w not in names]
    known = next(iter(tensors.names), "nothing")
    raise AdapterError(
        f"the reference weights hold no '{missing[0]}' ({len(missing)} of {len(wanted)} layers are "
        f"missing; they hold for example '{known}'). Give the checkpoint that this model was quantized "
        "from, or a function of a layer's name."
    )


def _prefixes(first: str, names: Collection[str]) -> list[tuple[str, str]]:
    """Ways to rename: a prefix to take off, and one to put on, shortest first; nothing for nothing first."""
    parts = first.split(".")
    found = []
    # At least a layer's own name and ``weight`` have to agree.
    for count in range(max(1, len(parts) - 1)):
        old = "".join(f"{part}." for part in parts[:count])
        tail = first[len(old) :]
        ends = [name[: -len(tail)] for name in names if name.endswith(tail)]
        found += [(old, new) for new in sorted(ends, key=len) if not new or new.endswith(".")]
    return found
