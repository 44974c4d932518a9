"""Named tensors that are read one at a time: a safetensors checkpoint, a mapping, a model, a function."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorainit.adapters.targets import weight_shape
from lorainit.adapters.weights import read_weight
from lorainit.errors import AdapterError

TensorSource = str | Path | Mapping[str, Tensor] | nn.Module | Callable[[str], Tensor]
"""What weights can be given as, see `lorainit.get_peft_model`."""


class NamedTensors(Protocol):
    """Tensors by name; none is held."""

    @property
    def names(self) -> Collection[str] | None:
        """All of them; None where any name may be asked for."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one, without reading it where that can be."""

    def read(self, name: str, rows: int | None = None) -> Tensor:
        """One of them, detached, or so many of its first rows."""


def named_tensors(source: TensorSource) -> NamedTensors:
    """The source as named tensors.

    Raises:
        AdapterError: it is nothing that tensors can be read from.
    """
    if isinstance(source, str | Path):
        return CheckpointTensors(Path(source))
    if isinstance(source, nn.Module):
        return ModelTensors(source)
    if isinstance(source, Mapping):
        return MappedTensors(source)
    if callable(source):
        return ComputedTensors(source)
    raise AdapterError(
        f"reference_weights cannot be a {type(source).__name__}: give a checkpoint folder, a mapping of "
        "names to tensors, a model, or a function of a layer's name."
    )


class CheckpointTensors:
    """A safetensors file, or a folder with one or with shards; a read opens one file and closes it again.

    Attributes:
        path: as it was given.
        files: by tensor name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            self.files = _files_of_folder(path)
        elif path.is_file():
            self.files = dict.fromkeys(_names_in(path), path)
        else:
            raise AdapterError(
                f"reference_weights: '{path}' is no folder and no file. Give the checkpoint on this "
                "disk; huggingface_hub.snapshot_download fetches one from the hub."
            )

    @property
    def names(self) -> Collection[str]:
        """As in the files."""
        return self.files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """From the file's header."""
        with safe_open(self.files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str, rows: int | None = None) -> Tensor:
        """On the CPU; of some rows the file's other parts are not read."""
        with safe_open(self.files[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[:rows]
            return found


def _names_in(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"reference_weights: '{file}' cannot be read as safetensors ({error}). Save the full-precision "
            "model with save_pretrained again."
        ) from error


def _files_of_folder(folder: Path) -> dict[str, Path]:
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        try:
            places = json.loads(index[0].read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterError(
                f"reference_weights: '{index[0]}' is no index of shards ({error!r}). Save the "
                "full-precision model with save_pretrained again."
            ) from error
        files = {name: folder / file for name, file in places.items()}
        absent = sorted({str(file) for file in files.values() if not file.is_file()})
        if absent:
            raise AdapterError(
                f"reference_weights: '{absent[0]}' is not there, which the index names "
                f"({len(absent)} such files). Fetch the whole checkpoint."
            )
        return files
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise AdapterError(
            f"reference_weights: '{folder}' holds no safetensors file. Save the full-precision model "
            "there with save_pretrained."
        )
    return {name: shard for shard in shards for name in _names_in(shard)}


class MappedTensors:
    """A mapping's tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> Collection[str]:
        """The keys."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str, rows: int | None = None) -> Tensor:
        """The tensor."""
        return self._tensors[name].detach()[:rows]


class ModelTensors:
    """A model's parameters by name; weights of linear layers as ``(out, in)``, however they are stored."""

    def __init__(self, model: nn.Module) -> None:
        linear = {n: m for n, m in model.named_modules() if weight_shape(m) is not None}
        self._layers = {f"{n}.weight" if n else "weight": m for n, m in linear.items()}
        self._others = {
            n: p for n, p in model.named_parameters(remove_duplicate=False) if n not in self._layers
        }

    @property
    def names(self) -> Collection[str]:
        """Of weights and of other parameters."""
        return [*self._layers, *self._others]

    def shape(self, name: str) -> tuple[int, ...]:
        """``(out, in)`` of a linear layer, as it is of any other."""
        module = self._layers.get(name)
        if module is None:
            return tuple(self._others[name].shape)
        shape = weight_shape(module)
        assert shape is not None
        return shape

    def read(self, name: str, rows: int | None = None) -> Tensor:
        """Dequantized or gathered, where it has to be."""
        module = self._layers.get(name)
        whole = self._others[name].detach() if module is None else read_weight(module, name)
        return whole[:rows]


class ComputedTensors:
    """What a function gives for a layer's name."""

    names = None

    def __init__(self, function: Callable[[str], Tensor]) -> None:
        self._function = function

    def shape(self, name: str) -> tuple[int, ...]:
        """Of what the function gives; it is called for it."""
        return tuple(self.read(name).shape)

    def read(self, name: str, rows: int | None = None) -> Tensor:
        """Detached."""
        found = self._function(name)
        if not isinstance(found, torch.Tensor):
            raise AdapterError(
                f"reference_weights gave a {type(found).__name__} for layer '{name}': let the function "
                "return a torch.Tensor of the layer's shape."
            )
        return found.detach()[:rows]
