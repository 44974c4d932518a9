"""The models in few bytes, for machines that get them over a narrow road.

``python -m benchmarks.quality.models.packing`` writes SmolLM2 (97 MB), ``--model gemma-3-270m`` Gemma (247
MB), as files of at most 45 MB with the GGUF file's own blocks, and the configuration; from them `load_packed`
makes the very weights of ``benchmarks.common.models``, in seconds and without ``gguf``. ``--model
all-minilm-l6-v2`` writes MiniLM (45 MB, in bfloat16: the benchmark rounds the weights to it anyway); the vision
transformer's folder is small as it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, Gemma3ForCausalLM, LlamaForCausalLM, PreTrainedModel

from benchmarks.common.cache import cache_folder
from benchmarks.common.models import (
    gemma_folder,
    gemma_gguf,
    load_gemma,
    load_minilm,
    load_smollm2,
    smollm2_folder,
    smollm2_gguf,
)
from benchmarks.quality.models.gguf_blocks import BLOCKS, dequantize

MOST_BYTES = 45_000_000
"""Of one file."""

CLASSES: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "gemma3_text": Gemma3ForCausalLM,
}
"""By ``model_type``."""

_ROWS = ".rows-"

_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_GEMMA_NAMES = _NAMES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def load_packed(folder: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model in float32 and eval mode.

    Raises:
        ValueError: the folder holds no model of `CLASSES`, or not all of it.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in CLASSES:
        raise ValueError(f"{folder} holds a model of another kind: {config.model_type}")
    with torch.device(device):
        model = CLASSES[config.model_type](config)
    weights = dict(_unpacked(folder, device))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ValueError(f"{folder} does not hold this model: {(missing + unexpected)[:3]}")
    model.tie_weights()
    return model.eval()


def _unpacked(folder: Path, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    """Names and weights in float32, the rows of one tensor joined."""
    rows: dict[str, dict[int, Tensor]] = {}
    for path in sorted(folder.glob("blocks-*.safetensors")):
        with safe_open(path, framework="pt", device=str(device)) as file:
            kinds = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118
                raw = file.get_tensor(key)
                name, _, place = key.partition(_ROWS)
                kind = kinds.get(name) or _untyped(raw)
                weight = raw.float() if raw.dtype != torch.uint8 else dequantize(raw, kind)
                if not place:
                    yield name, weight
                    continue
                index, _, count = place.partition("-of-")
                found = rows.setdefault(name, {})
                found[int(index)] = weight
                if len(found) == int(count):
                    yield name, torch.cat([found[i] for i in range(len(found))])
                    del rows[name], found


def _untyped(raw: Tensor) -> str:
    """The type of a tensor of SmolLM2 in files that name none, as they once were: only two are there."""
    return "Q8_0" if raw.shape[-1] % 34 == 0 else "Q4_1"


def write_packed(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[Tensor, str]]
) -> None:
    """Write raw tensors with the names of their types; large ones as several pieces of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("blocks-*.safetensors"):
        path.unlink()
    files: list[dict[str, Tensor]] = [{}]
    have = 0
    for name, (raw, _) in tensors.items():
        count = -(-raw.nbytes // MOST_BYTES)
        pieces = raw.tensor_split(count)
        for index, piece in enumerate(pieces):
            if files[-1] and have + piece.nbytes > MOST_BYTES:
                files.append({})
                have = 0
            key = f"{name}{_ROWS}{index}-of-{count}" if count > 1 else name
            files[-1][key] = piece.contiguous().clone()
            have += piece.nbytes
    for number, members in enumerate(files):
        names = {key.partition(_ROWS)[0] for key in members}
        kinds = {name: tensors[name][1] for name in names}
        save_file(members, folder / f"blocks-{number:02}.safetensors", metadata=kinds)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


@dataclass(frozen=True)
class Source:
    """A model that comes as a GGUF file.

    Attributes:
        gguf: writes that file into a folder.
        folder: the converted model.
        load: what must come back, weight by weight.
        names: of the parts of a layer.
        change: ``(name, raw, configuration)`` to the weight as transformers has it.
    """

    gguf: Callable[[Path], Path]
    folder: Callable[[], Path]
    load: Callable[[], PreTrainedModel]
    names: Mapping[str, str]
    change: Callable[[str, Tensor, Mapping[str, Any]], Tensor]


def _unpermute(name: str, raw: Tensor, config: Mapping[str, Any]) -> Tensor:
    """GGUF interleaves the halves of each head's rotation; transformers keeps them apart."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return raw
    split = raw.reshape(-1, config["head_dim"] // 2, 2, raw.shape[-1])
    return split.transpose(1, 2).reshape(raw.shape)


def _without_one(name: str, raw: Tensor, config: Mapping[str, Any]) -> Tensor:
    """GGUF stores what Gemma's norms multiply by; transformers stores that less one."""
    del config
    return raw - 1 if name.endswith("norm.weight") else raw


SOURCES = {
    "smollm2-135m-instruct": Source(smollm2_gguf, smollm2_folder, load_smollm2, _NAMES, _unpermute),
    "gemma-3-270m": Source(gemma_gguf, gemma_folder, load_gemma, _GEMMA_NAMES, _without_one),
}


def pack(folder: Path, model: str = "smollm2-135m-instruct") -> None:
    """Write a packed model of `SOURCES`, and check that it gives every weight back exactly."""
    import gguf

    source = SOURCES[model]
    config = json.loads((source.folder() / "config.json").read_text())
    tensors: dict[str, tuple[Tensor, str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for tensor in gguf.GGUFReader(source.gguf(Path(scratch))).tensors:
            name, kind = _name(tensor.name, source.names), tensor.tensor_type.name
            raw = torch.from_numpy(tensor.data.copy())
            if raw.dtype == torch.uint8 and kind not in BLOCKS:
                raise ValueError(f"{tensor.name} is of the type {kind}, which is not unpacked here")
            tensors[name] = (source.change(name, raw, config), kind)
    write_packed(folder, config, tensors)
    ours, theirs = load_packed(folder).state_dict(), source.load().state_dict()
    different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    if different or len(ours) != len(theirs):
        raise RuntimeError(f"the packed model differs in {different[:3]}")


def pack_encoder(folder: Path) -> None:
    """MiniLM in bfloat16, as an ordinary folder."""
    load_minilm(dtype=torch.bfloat16).save_pretrained(folder)


def _name(gguf_name: str, names: Mapping[str, str]) -> str:
    if gguf_name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if gguf_name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{names[part]}.weight"


FOLDERS = {
    "smollm2-135m-instruct": "packed",
    "gemma-3-270m": "packed-gemma-3-270m",
    "all-minilm-l6-v2": "packed-minilm",
}
"""In the cache."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(FOLDERS), default="smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, help="folder; by default in the cache")
    arguments = parser.parse_args()
    folder = arguments.out or cache_folder() / FOLDERS[arguments.model]
    if arguments.model in SOURCES:
        pack(folder, arguments.model)
    else:
        pack_encoder(folder)
    for path in sorted(folder.iterdir()):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
