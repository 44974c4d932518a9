"""Safetensors files written tensor by tensor, in one file or in shards with an index, and read.

The shards and their index follow the convention of transformers: ``NAME.index.json`` maps every
tensor to the file that holds it. Whatever is written takes its place last of all, by one renaming.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lorainit.files.aside import Aside, lock, sweep
from lorainit.files.marked import INDEX, check_target, index_of, is_shard, mark_of, table_of

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""Their names in a safetensors header."""


class Entry(NamedTuple):
    """A tensor that will be written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write(
    path: Path,
    entries: Sequence[Entry],
    tensors: Iterator[Tensor],
    header: Mapping[str, str],
    max_bytes: int,
) -> None:
    """Write tensors as they come: one file, or, above `max_bytes`, shards of about that size.

    What was there before is whole until everything is written, and is removed then.

    Args:
        path: of the file; of shards, what their index is named after.
        entries: what will come, in this order.
        tensors: on any device; each may be forgotten when the next is asked for.
        header: texts by name.
        max_bytes: of a file; a tensor that alone is larger has a file of its own.

    Raises:
        OSError: what was there before is still there, and nothing else.
    """
    mark = header.get("format", "")
    path.parent.mkdir(parents=True, exist_ok=True)
    check_target(path, mark)
    sweep(path.parent)
    _sweep_shards(path, mark)
    before = _files_of(path, mark)
    parts = _parts(entries, max_bytes)
    made: list[Aside] = []
    try:
        for part in parts:
            made.append(Aside(path.parent))
            own = header if len(parts) == 1 else {"format": mark}
            _write_file(made[-1].file, part, tensors, own)
        if len(parts) == 1:
            made[0].put(path)
            known = {path}
        else:
            known = _put_shards(path, made, parts, header)
    except BaseException:
        # From the moment that the index has its name, the shards are its own.
        if len(made) <= len(parts) or made[-1].path.exists():
            for aside in made:
                aside.discard()
        raise
    _remove([old for old in before if old not in known])
    # Locked until the index names them, so that no other save takes them for left over.
    for aside in made:
        aside.close()


def _put_shards(
    path: Path, made: list[Aside], parts: Sequence[Sequence[Entry]], header: Mapping[str, str]
) -> set[Path]:
    """Give the shards their names, and write the index over the old one, last of all."""
    token = secrets.token_hex(8)
    places: dict[str, str] = {}
    for number, (aside, part) in enumerate(zip(list(made), parts, strict=True), 1):
        name = f"{path.stem}-{token}-{number:05d}-of-{len(parts):05d}{path.suffix}"
        aside.put(path.with_name(name), final=False)
        places |= {entry.key: name for entry in part}
    total = sum(entry.nbytes for part in parts for entry in part)
    index = {"metadata": {**header, "total_size": total}, "weight_map": places}
    known = {aside.path for aside in made} | {index_of(path)}
    made.append(Aside(path.parent))
    made[-1].file.write(json.dumps(index).encode())
    made[-1].put(index_of(path))
    return known


def _parts(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    parts: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if parts[-1] and size + entry.nbytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry.nbytes
    return parts


def _write_file(
    file: BinaryIO,
    entries: Sequence[Entry],
    tensors: Iterator[Tensor],
    header: Mapping[str, str],
) -> None:
    file.write(_header(entries, header))
    for entry in entries:
        tensor = next(tensors)
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise ValueError(f"'{entry.key}' is not the tensor that was announced")
        _write_tensor(file, tensor)
    file.flush()


def _header(entries: Sequence[Entry], header: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(header)}
    begin = 0
    for entry in entries:
        end = begin + entry.nbytes
        table[entry.key] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    file.write(flat.numpy().data)


def _files_of(path: Path, mark: str) -> list[Path]:
    """What a save under this name has left: its own files alone, by their names and their mark."""
    found = [path] if path.is_file() and mark_of(path.resolve()) == mark else []
    table = table_of(index_of(path))
    if table["metadata"].get("format") == mark:
        found.append(index_of(path))
        shards = {name for name in table["weight_map"].values() if is_shard(path, name)}
        found += [p for name in sorted(shards) if mark_of(p := path.with_name(name)) == mark]
    return found


def _sweep_shards(path: Path, mark: str) -> None:
    """Remove shards of a save that was killed: no index names them, and nobody writes them now."""
    for name in os.listdir(path.parent):
        shard = path.with_name(name)
        if not is_shard(path, name) or mark_of(shard) != mark:
            continue
        with contextlib.suppress(OSError):
            number = os.open(shard, os.O_RDONLY)
            try:
                # Read after the lock: whoever held it may have written the index meanwhile.
                if lock(number) and name not in table_of(index_of(path))["weight_map"].values():
                    shard.unlink()
            finally:
                os.close(number)


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


class Stored:
    """The tensors of one file or of its shards, each read when it is asked for."""

    def __init__(self, files: Mapping[str, Any], header: Mapping[str, str]) -> None:
        self._files = files
        self.header = dict(header)

    def keys(self) -> list[str]:
        """Of all tensors."""
        return list(self._files)

    def tensor(self, key: str) -> Tensor:
        """One tensor; KeyError where there is none."""
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor

    def shape(self, key: str) -> list[int]:
        """Of one tensor, which is not read."""
        shape: list[int] = self._files[key].get_slice(key).get_shape()
        return shape


@contextlib.contextmanager
def opened(path: Path, device: str) -> Iterator[Stored]:
    """What `write` wrote, by the name that it was given or by its index's.

    Raises:
        FileNotFoundError: neither is there, or a shard is not.
        ValueError, KeyError, TypeError: the index is damaged.
    """
    index = path if path.name.endswith(INDEX) else index_of(path)
    with ExitStack() as stack:
        if path.is_file() and path != index:
            file = stack.enter_context(safe_open(path, framework="pt", device=device))
            yield Stored({key: file for key in file.keys()}, file.metadata() or {})  # noqa: SIM118
            return
        if not index.is_file():
            raise FileNotFoundError(str(path))
        table = json.loads(index.read_text(encoding="utf-8"))
        places = table["weight_map"]
        names = set(places.values())
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("the index names files in other folders")
        shards = {}
        for name in sorted(names):
            shard = index.with_name(name)
            if not shard.is_file():
                raise FileNotFoundError(str(shard))
            shards[name] = stack.enter_context(safe_open(shard, framework="pt", device=device))
        header = {str(k): v for k, v in table["metadata"].items() if isinstance(v, str)}
        yield Stored({key: shards[name] for key, name in places.items()}, header)
