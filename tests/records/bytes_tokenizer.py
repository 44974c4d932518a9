"""A byte-level tokenizer trained on the spot, with any chat template, that starts texts with a token."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>"]
TEXTS = ["hello world", "what is two plus two", "the weather in Paris is fine"]


def tokenizer(template: Any = None, *, strips: bool = False) -> PreTrainedTokenizerFast:
    """Args:
    template: of chats.
    strips: drop white space at a text's ends.
    """
    from tokenizers import normalizers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if strips:
        backend.normalizer = normalizers.Strip()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIALS[3:],
        chat_template=template,
    )
