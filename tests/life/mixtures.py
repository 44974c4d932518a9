"""Tiny mixtures of experts, fused and not, each with a batch that its forward takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def _mixtral(**changes: Any) -> Any:
    return t.MixtralForCausalLM(t.MixtralConfig(**(_SMALL | changes)))


def _qwen3() -> Any:
    return t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(
            **_SMALL, head_dim=4, moe_intermediate_size=12, num_experts=4, norm_topk_prob=True
        )
    )


def _qwen2() -> Any:
    return t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(
            **_SMALL, moe_intermediate_size=12, shared_expert_intermediate_size=12, num_experts=4
        )
    )


def _gpt_oss() -> Any:
    model = t.GptOssForCausalLM(t.GptOssConfig(**_SMALL, head_dim=4, attention_dropout=0.0))
    for module in model.modules():
        if type(module).__name__ == "GptOssExperts":
            # New ones are zero, as biases are.
            torch.nn.init.normal_(module.gate_up_proj_bias, std=0.1)
            torch.nn.init.normal_(module.down_proj_bias, std=0.1)
    return model


FUSED: dict[str, Callable[[], Any]] = {
    "mixtral": _mixtral,
    "qwen2-shared-expert": _qwen2,
    "qwen3": _qwen3,
    "gpt-oss-transposed-biases": _gpt_oss,
}


def built(make: Callable[[], Any], **changes: Any) -> Any:
    """The same weights each time, large enough that experts are chosen and gradients are not tiny."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(**changes)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if (
                    (parameter.dim() > 1 and "experts" in name)
                    or "router" in name
                    or "gate" in name
                ):
                    parameter.normal_(std=0.2)
        return model.eval()


def mixtral(**changes: Any) -> Any:
    return built(_mixtral, **changes)


def batch(rows: int = 6, length: int = 10, seed: int = 1) -> dict[str, Tensor]:
    """Ragged rows, some padded on the left and some on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 64, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        cut = 1 + row % 4
        if row % 2:
            mask[row, :cut] = 0
        else:
            mask[row, -cut:] = 0
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def switch() -> Any:
    """An encoder-decoder whose experts are linear layers, one expert for each token."""

    def make() -> Any:
        return t.SwitchTransformersForConditionalGeneration(
            t.SwitchTransformersConfig(
                vocab_size=64,
                d_model=16,
                d_kv=4,
                d_ff=24,
                num_layers=2,
                num_decoder_layers=2,
                num_sparse_encoder_layers=1,
                num_sparse_decoder_layers=1,
                num_heads=4,
                num_experts=6,
                expert_capacity=64,
                decoder_start_token_id=0,
                router_jitter_noise=0.0,
                dropout_rate=0.0,
            )
        )

    return built(make)


def pairs() -> dict[str, Tensor]:
    """Rows of one length, with short answers."""
    generator = torch.Generator().manual_seed(3)
    return {
        "input_ids": torch.randint(1, 64, (3, 4), generator=generator),
        "labels": torch.randint(1, 64, (3, 2), generator=generator),
    }
