"""Tiny models of the kinds that people adapt, and ragged data for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig
from torch import Tensor, nn

VOCABULARY = 37
Batch = dict[str, Tensor]


def all_linear(**settings: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear", **settings)


def _made(build: Callable[[], nn.Module], dtype: torch.dtype, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().to(dtype).eval()


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> Any:
    """Two layers, grouped queries: q and o 16 x 16, k and v 8 x 16."""
    config = hf.LlamaConfig(
        vocab_size=settings.pop("vocab_size", VOCABULARY),
        hidden_size=settings.pop("hidden_size", 16),
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=settings.pop("num_key_value_heads", 2),
        max_position_embeddings=64,
        pad_token_id=0,
        # Eager attention's softmax is float32, whatever the model is.
        attn_implementation="sdpa",
        **settings,
    )
    return _made(lambda: hf.LlamaForCausalLM(config), dtype, seed)


def gpt2(dtype: torch.dtype = torch.float32, head: str = "LMHeadModel", **settings: Any) -> Any:
    """Conv1D layers, which keep their weight as (in, out)."""
    config = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
        **settings,
    )
    return _made(lambda: getattr(hf, f"GPT2{head}")(config), dtype)


def bert(dtype: torch.dtype = torch.float32, head: str = "", **settings: Any) -> Any:
    config = hf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
        **settings,
    )
    return _made(lambda: getattr(hf, f"BertFor{head}")(config), dtype)


def t5(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        **settings,
    )
    return _made(lambda: hf.T5ForConditionalGeneration(config), dtype)


def vit(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    config = hf.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
        attn_implementation="eager",
        **settings,
    )
    return _made(lambda: hf.ViTForImageClassification(config), dtype)


def whisper(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=32,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        begin_suppress_tokens=None,
        attn_implementation="eager",
        **settings,
    )
    return _made(lambda: hf.WhisperForConditionalGeneration(config), dtype)


def wav2vec2(dtype: torch.dtype = torch.float32) -> Any:
    config = hf.Wav2Vec2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8),
        conv_kernel=(4, 2),
        conv_stride=(3, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=12,
        num_labels=3,
        apply_spec_augment=False,
        attn_implementation="eager",
    )
    return _made(lambda: hf.Wav2Vec2ForSequenceClassification(config), dtype)


class Perceptron(nn.Module):
    """Two layers; keyword inputs; logits as they are, or in a dictionary."""

    def __init__(self, *, as_dict: bool = False, bias: bool = True, depth: int = 2) -> None:
        super().__init__()
        sizes = [5, *([7] * (depth - 1)), 3]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(
                nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes)
            )
        self.as_dict = as_dict

    def forward(self, x: Tensor, **_: Any) -> Any:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        x = self.layers[-1](x)
        return {"logits": x} if self.as_dict else x


# --- data ---------------------------------------------------------------------------------------


def sequences(count: int = 7, seed: int = 1, shortest: int = 4, longest: int = 11) -> list[Batch]:
    """Ragged sequences of tokens, each a prompt without labels and at least two labels."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        prompt = int(torch.randint(1, length - 2, (), generator=generator))
        labels = ids.clone()
        labels[:prompt] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def pad(
    rows: Sequence[Mapping[str, Tensor]], *, side: str = "right", extra: int = 0
) -> dict[str, Tensor]:
    """One batch of ragged rows; padding is token 0, label -100, mask 0."""
    length = max(len(row["input_ids"]) for row in rows) + extra
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    columns: dict[str, list[Tensor]] = {key: [] for key in fills}
    for row in rows:
        missing = length - len(row["input_ids"])
        whole = dict(row) | {"attention_mask": torch.ones_like(row["input_ids"])}
        for key, fill in fills.items():
            filler = torch.full((missing,), fill)
            parts = [whole[key], filler] if side == "right" else [filler, whole[key]]
            columns[key].append(torch.cat(parts))
    return {key: torch.stack(values) for key, values in columns.items()}


def batches(
    rows: Sequence[Mapping[str, Tensor]], size: int, *, side: str = "right", extra: int = 0
) -> list[Batch]:
    return [
        pad(rows[first : first + size], side=side, extra=extra)
        for first in range(0, len(rows), size)
    ]


def pack(rows: Iterable[Mapping[str, Tensor]]) -> Batch:
    """All sequences in one row, told apart by position ids, as padding-free collators do it."""
    rows = list(rows)
    return {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "labels": torch.cat([row["labels"] for row in rows])[None],
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],
    }


def classified(rows: Sequence[Mapping[str, Tensor]], classes: int, size: int) -> list[Batch]:
    """Padded batches with one label a sequence."""
    found = batches(rows, size)
    first = 0
    for batch in found:
        count = len(batch["labels"])
        batch["labels"] = torch.arange(first, first + count) % classes
        first += count
    return found


def seq2seq(rows: Sequence[Mapping[str, Tensor]], size: int, extra: int = 0) -> list[Batch]:
    """Inputs are the sequences; targets their reversed second halves, padded with -100."""
    found = []
    for first in range(0, len(rows), size):
        some = rows[first : first + size]
        batch = pad(some, extra=extra)
        targets = [row["input_ids"].flip(0)[: 1 + len(row["input_ids"]) // 2] for row in some]
        labels = torch.nn.utils.rnn.pad_sequence(targets, True, -100)
        batch["labels"] = torch.nn.functional.pad(labels, (0, extra), value=-100)
        found.append(batch)
    return found


def to_float64(batch: Mapping[str, Tensor]) -> Batch:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
