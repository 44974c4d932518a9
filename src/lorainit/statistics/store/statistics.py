"""Statistics of all target layers, and their safetensors files, never pickled."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from lorainit._version import __version__
from lorainit.errors import StatisticsFileError
from lorainit.files.marked import STATISTICS, no_statistics
from lorainit.models.page_locked import copied_to_host
from lorainit.parallel import collectives
from lorainit.parallel.exchange import broadcast_from_owners
from lorainit.statistics.store import layer_table
from lorainit.statistics.store.packed_symmetric import is_symmetric, pack, packed_size, unpack
from lorainit.statistics.store.partition import Shares, shares_of, table_of, write_shared
from lorainit.statistics.store.sharded_files import Entry, Stored, opened, write
from lorainit.types import LayerStatistics
from lorainit.types.byte_size import parse_bytes

_FORMAT_VERSION = 2
"""Version 1 had no triangles and no shards."""

MAX_SHARD_SIZE = 4 << 30
"""Bytes of a file."""


class Statistics(Mapping[str, LayerStatistics]):
    """Statistics by target: the base model's own dotted module name to `LayerStatistics`.

    Where they are shared out over processes, each holds some layers, and the mapping is of those.

    Attributes:
        metadata: what they were made of: needs, token mask, loss reduction, counts, model class.
        fingerprints: a few entries of each layer's base weight, ``(<= 32,)`` float32, by which a
            file that was made for another model is told apart. Of all layers, everywhere.
        shares: which process holds which layer; None where this one holds all.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerStatistics],
        metadata: Mapping[str, Any] | None = None,
        fingerprints: Mapping[str, Tensor] | None = None,
        shares: Shares | None = None,
    ) -> None:
        self._layers = dict(layers)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.fingerprints: dict[str, Tensor] = dict(fingerprints or {})
        self.shares = shares

    def __getitem__(self, name: str) -> LayerStatistics:
        try:
            return self._layers[name]
        except KeyError:
            if self.shares is not None and name in self.shares.owners:
                raise KeyError(
                    f"process {self.shares.owners[name]} holds the statistics of layer '{name}', "
                    f"this one is {self.shares.rank}. Ask there, or call gathered() on all processes."
                ) from None
            raise KeyError(
                f"no statistics for layer '{name}'; there are {len(self)} layers"
                + (f", the first is '{next(iter(self))}'" if len(self) else "")
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        of = "" if self.shares is None else f" of {len(self.shares.owners)}"
        return (
            f"Statistics({len(self)}{of} layers, {self.metadata.get('sequences', '?')} sequences, "
            f"needs={self.metadata.get('needs')})"
        )

    @property
    def names(self) -> list[str]:
        """Names of all layers, those that other processes hold included."""
        return list(self._layers if self.shares is None else self.shares.owners)

    @property
    def available(self) -> frozenset[str]:
        """Names of the statistics that every layer here can give."""
        sets = [layer.available for layer in self._layers.values()]
        return frozenset.intersection(*sets) if sets else frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors here, each shared one counted once."""
        return sum(t.numel() * t.element_size() for t in self._unique_tensors()[0].values())

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Statistics:
        """The same statistics on another device or in another dtype; sharing is kept."""
        moved: dict[int, Tensor] = {}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(device=device, dtype=dtype)
            return moved[id(tensor)]

        layers = {}
        for name, layer in self._layers.items():
            values = {f: getattr(layer, f) for f in LayerStatistics.TENSORS}
            tensors: dict[str, Any] = {f: move(t) for f, t in values.items() if t is not None}
            layers[name] = replace(layer, **tensors)
        return Statistics(layers, self.metadata, self.fingerprints, self.shares)

    def gathered(self) -> Statistics:
        """All layers on every process. Where they are shared out, all processes must call it."""
        if self.shares is None:
            return self
        tensors, places = self._unique_tensors()
        own = {name: layer_table.layer_record(self[name], places[name]) for name in self}
        shapes = {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}
        table = table_of(own, shapes, self.shares)
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
        broadcast_from_owners(tensors, table.slots, device)
        layers = layer_table.read_layers(table.records, tensors)
        return Statistics(layers, self.metadata, self.fingerprints)

    def release(self, name: str) -> None:
        """Forget a layer; its tensors are freed, unless another layer or the caller holds them."""
        self._layers.pop(name, None)

    def relieve(self, device: torch.device, nbytes: int) -> None:
        """Move layers from `device` to the host, last ones first, until so many bytes are free.

        Beside the largest of the moved layers, which comes back to be solved.
        """
        moved: dict[int, Tensor] = {}
        freed = back = 0
        for layer in reversed(self._layers.values()):
            if freed >= nbytes + back:
                break
            there = [t for t in _tensors_of(layer).values() if t.device == device]
            back = max(back, sum(t.nbytes for t in there))
            for tensor in there:
                if id(tensor) not in moved:
                    moved[id(tensor)] = copied_to_host(tensor)
                    freed += tensor.nbytes
        # Not before: the address of a tensor that is gone may be another one's.
        for name, layer in self._layers.items():
            # Layers that share a tensor that was moved share the moved one.
            found: dict[str, Any] = {
                f: moved[id(t)] for f, t in _tensors_of(layer).items() if id(t) in moved
            }
            if found:
                self._layers[name] = replace(layer, **found)

    def save(
        self, path: str | os.PathLike[str], *, max_shard_size: int | str = MAX_SHARD_SIZE
    ) -> None:
        """Write one safetensors file, or shards and their index where that is larger.

        Symmetric matrices are written as one triangle. Everything is written aside first and takes its
        place by one renaming, so what was there before survives a failure. Where the layers are shared
        out over processes, all must call it, and the first writes all layers, one tensor at a time.

        Args:
            path: of the file; of shards, ``PATH.index.json`` says what lies where, and `load` takes
                either name.
            max_shard_size: of a file, in bytes or as ``"4GiB"``.

        Raises:
            OSError: the files cannot be written; what was there before is still there.
        """
        path, limit = Path(path), parse_bytes(max_shard_size, "max_shard_size")
        assert limit is not None
        tensors, places = self._unique_tensors()
        layers = {name: layer_table.layer_record(self[name], places[name]) for name in self}
        prints = {layer_table.FINGERPRINT + name: t for name, t in self.fingerprints.items()}
        triangles = {
            key: t.shape[0]
            for key, t in tensors.items()
            if key.endswith(layer_table.SYMMETRIC) and is_symmetric(t)
        }
        shapes = {
            key: ((packed_size(triangles[key]),) if key in triangles else tuple(t.shape), t.dtype)
            for key, t in tensors.items()
        }
        if self.shares is not None:
            table = table_of(layers, shapes, self.shares)
            every = collectives.gather_objects(triangles)
            triangles = {key: width for theirs in every for key, width in theirs.items()}
            layers = table.records
        header = {
            "format": STATISTICS,
            "version": str(_FORMAT_VERSION),
            "lorainit": __version__,
            "layers": json.dumps(layers),
            "metadata": json.dumps(self.metadata),
            "triangles": json.dumps(triangles),
        }
        stored = _Packing(tensors, triangles)
        try:
            if self.shares is None:
                entries = [Entry(key, *shape) for key, shape in shapes.items()]
                entries += [Entry(key, tuple(t.shape), t.dtype) for key, t in prints.items()]
                written = chain((stored[key] for key in shapes), prints.values())
                write(path, entries, written, header, limit)
            else:
                write_shared(path, table, stored, prints, header, limit)
        except OSError as error:
            raise OSError(
                f"statistics could not be written to '{path}': {error}. What was there before is still "
                "there; free some space or choose another place, and save again."
            ) from error

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        *,
        gather: bool = True,
    ) -> Statistics:
        """Read a file that `save` wrote. It is data: nothing in it is executed.

        Args:
            path: of the file.
            device: where the tensors shall lie.
            gather: over several processes, read all layers on every one. If not, each reads its
                share, as `collect_statistics` deals them out.

        Raises:
            StatisticsFileError: not such a file, truncated, or of a newer format.
        """
        path = Path(path)
        try:
            with opened(path, str(device)) as file:
                header = file.header
                _check_header(path, header)
                table = layer_table.read_table(header["layers"])
                triangles = layer_table.read_triangles(header.get("triangles", "{}"))
                shares = None if gather else _shares(table, file)
                own = table
                if shares is not None:
                    own = {n: r for n, r in table.items() if shares.owners[n] == shares.rank}
                wanted = {key for record in own.values() for key in record["tensors"].values()}
                wanted |= {key for key in file.keys() if key.startswith(layer_table.FINGERPRINT)}  # noqa: SIM118
                tensors = {}
                for key in sorted(wanted):
                    tensor = file.tensor(key)
                    width = triangles.get(key)
                    tensors[key] = tensor if width is None else unpack(tensor, width)
            layers = layer_table.read_layers(own, tensors)
            metadata = layer_table.read_metadata(header["metadata"])
            prints = layer_table.read_fingerprints(tensors, table)
        except FileNotFoundError as error:
            missing = "" if str(error) == str(path) else f": its part '{error}' is missing"
            raise no_statistics(path, missing) from None
        except OSError as error:
            raise StatisticsFileError(
                f"'{path}' cannot be read ({error.strerror or error}). Look at its place and permissions, or "
                "collect the statistics again."
            ) from error
        except SafetensorError as error:
            raise StatisticsFileError(
                f"'{path}' cannot be read as a statistics file ({error}): it is truncated or "
                "damaged. Collect the statistics again."
            ) from error
        except (
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            RecursionError,
            RuntimeError,
        ) as error:
            if isinstance(error, StatisticsFileError):
                raise
            raise StatisticsFileError(
                f"'{path}': its table of layers is damaged or does not fit its tensors "
                f"({type(error).__name__}: {str(error)[:200]}). Collect the statistics again."
            ) from error
        return cls(layers, metadata, prints, shares)

    def _unique_tensors(self) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
        """Tensors by key, a shared one under its first layer's key only; and each layer's keys."""
        tensors: dict[str, Tensor] = {}
        known: dict[int, str] = {}
        places: dict[str, dict[str, str]] = {}
        for name, layer in self._layers.items():
            places[name] = {}
            for field in LayerStatistics.TENSORS:
                tensor = getattr(layer, field)
                if tensor is None:
                    continue
                key = known.setdefault(id(tensor), f"{layer_table.LAYER}{name}/{field}")
                tensors[key] = tensor
                places[name][field] = key
        return tensors, places


def _tensors_of(layer: LayerStatistics) -> dict[str, Tensor]:
    """A layer's tensors by field."""
    return {f: t for f in layer.TENSORS if (t := getattr(layer, f)) is not None}


class _Packing(Mapping[str, Tensor]):
    """Tensors as they are stored: packed when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], triangles: Mapping[str, int]) -> None:
        self._tensors, self._triangles = tensors, triangles

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        return pack(tensor) if key in self._triangles else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _shares(table: Mapping[str, Mapping[str, Any]], file: Stored) -> Shares | None:
    """How the layers are dealt out; None for one process."""
    places = {name: list(record["tensors"].values()) for name, record in table.items()}
    shares = shares_of(places, lambda key: math.prod(file.shape(key)))
    return None if shares.size == 1 else shares


def _check_header(path: Path, header: Mapping[str, str]) -> None:
    if header.get("format") != STATISTICS:
        raise StatisticsFileError(
            f"'{path}' is a safetensors file, but not one of lorainit's statistics. Give the file that "
            "Statistics.save wrote."
        )
    if int(header["version"]) > _FORMAT_VERSION:
        raise StatisticsFileError(
            f"'{path}' has format version {header['version']}, written by lorainit "
            f"{header.get('lorainit')}; this is {__version__}, which reads up to {_FORMAT_VERSION}. "
            "Upgrade lorainit."
        )
