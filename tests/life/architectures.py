"""Tiny models of many kinds, each with a batch that its forward takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model, its data, and what to target.

    Attributes:
        build: makes the model, the same each time.
        data: a batch for the statistics and the training.
        changes: to the LoraConfig.
    """

    build: Callable[[], nn.Module]
    data: Callable[[], dict[str, Tensor]]
    changes: dict[str, Any] = field(default_factory=dict)


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make().eval()

    return build


def _ids(rows: int = 4, length: int = 8, vocabulary: int = 60) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    lengths = torch.tensor([8, 6, 5, 8])[:rows, None]
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _causal() -> dict[str, Tensor]:
    batch = _ids()
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _classes() -> dict[str, Tensor]:
    return _ids() | {"labels": torch.tensor([0, 2, 1, 2])}


def _tags() -> dict[str, Tensor]:
    batch = _ids()
    tags = batch["input_ids"] % 3
    return batch | {"labels": tags.masked_fill(batch["attention_mask"] == 0, -100)}


def _sequence_to_sequence() -> dict[str, Tensor]:
    labels = torch.randint(3, 60, (4, 5), generator=torch.Generator().manual_seed(2))
    labels[1, 3:] = -100
    return _ids() | {"labels": labels}


def _images() -> dict[str, Tensor]:
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2, 1, 2])}


def _speech() -> dict[str, Tensor]:
    features = torch.randn(4, 8, 24, generator=torch.Generator().manual_seed(4))
    labels = torch.randint(3, 60, (4, 5), generator=torch.Generator().manual_seed(5))
    labels[2, 2:] = -100
    return {"input_features": features, "labels": labels}


_SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _gpt2() -> nn.Module:
    return t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    )


def _t5() -> nn.Module:
    return t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=60,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        )
    )


def _vit() -> nn.Module:
    return t.ViTForImageClassification(
        t.ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
            num_labels=3,
        )
    )


def _whisper() -> nn.Module:
    return t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            vocab_size=60,
            num_mel_bins=8,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_source_positions=12,
            max_target_positions=12,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


def _bert(model: type[Any], **extra: Any) -> Callable[[], nn.Module]:
    return lambda: model(t.BertConfig(**_SMALL, num_labels=3, **extra))


CASES: dict[str, Case] = {
    "llama-gqa": Case(
        _seeded(lambda: t.LlamaForCausalLM(t.LlamaConfig(**_SMALL, num_key_value_heads=2))), _causal
    ),
    "qwen2-biases": Case(
        _seeded(lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_SMALL, num_key_value_heads=2))), _causal
    ),
    "gpt2-conv1d": Case(_seeded(_gpt2), _causal),
    "t5": Case(_seeded(_t5), _sequence_to_sequence),
    "bert-classes": Case(
        _seeded(_bert(t.BertForSequenceClassification)), _classes, {"task_type": "SEQ_CLS"}
    ),
    "bert-tags": Case(
        _seeded(_bert(t.BertForTokenClassification)),
        _tags,
        {"task_type": "TOKEN_CLS", "exclude_modules": ["classifier"]},
    ),
    "vit": Case(
        _seeded(_vit),
        _images,
        {"modules_to_save": ["classifier"], "exclude_modules": ["classifier"]},
    ),
    "whisper": Case(_seeded(_whisper), _speech),
}
