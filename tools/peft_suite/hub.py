"""The tiny models that PEFT's tests ask the hub for, made from their configurations in a local cache.

Of each the architecture is what the tests rely on; weights are random, and the tokenizer knows bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_GPT2: dict[str, Any] = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4}
_OPT = _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}
_EXPERTS = _SIZES | {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "head_dim": 8,
}
_BART: dict[str, Any] = {
    "vocab_size": 512,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 256,
}
_T5: dict[str, Any] = {
    "vocab_size": 512,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", _OPT | {"num_hidden_layers": 12}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        _GPT2 | {"rotary_dim": 4, "n_positions": 256},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", _SIZES),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        {"vocab_size": 512, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _SIZES),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _SIZES),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _SIZES),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", _SIZES),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _SIZES),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", _SIZES | {"head_dim": 8}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        _SIZES | {"head_dim": 8},
    ),
    "hf-internal-testing/Mixtral-tiny": ("MixtralForCausalLM", _EXPERTS),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", _EXPERTS),
    "hf-internal-testing/tiny-qwen3-moe": ("Qwen3MoeForCausalLM", _EXPERTS),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", _EXPERTS),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        _EXPERTS | {"intermediate_size_mlp": 48},
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _SIZES),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        _SIZES,
    ),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _SIZES),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        _SIZES,
    ),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", _SIZES),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _SIZES),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        _BART,
    ),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": (
        "T5ForConditionalGeneration",
        _T5,
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        _T5,
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    ),
}


def fill(cache: Path) -> list[str]:
    """Make the models that are not there yet, in the layout of the hub's cache; those that failed."""
    failed = []
    for name, (kind, settings) in MODELS.items():
        place = cache / f"models--{name.replace('/', '--')}"
        folder = place / "snapshots" / "0"
        if (place / "refs" / "main").is_file():
            continue
        try:
            torch.manual_seed(0)
            made: Any = getattr(transformers, kind)
            made(made.config_class(**settings)).save_pretrained(folder)
            _tokenizer().save_pretrained(folder)
        except Exception as error:
            failed.append(f"{name}: {error!r}"[:200])
            continue
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / "main").write_text("0")
    return failed


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({w: i for i, w in enumerate(special + letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=256,
    )


if __name__ == "__main__":
    print("\n".join(fill(Path(sys.argv[1]))) or "all made")
