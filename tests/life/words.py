"""Words, texts of them, and a tokenizer made on the spot: what no package but transformers is needed for."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(40)]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<a> {% generation %}{{ message['content'] }} <eos>"
    "{% endgeneration %}{% else %}<u> {{ message['content'] }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<a> {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of a fixed list, split at spaces."""
    specials = ["<pad>", "<eos>", "<u>", "<a>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(specials + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<u>", "<a>"],
        chat_template=TEMPLATE,
    )


def texts() -> list[tuple[str, str]]:
    """Sixteen ragged questions and answers."""
    return [
        (" ".join(WORDS[(i + j) % 40] for j in range(2 + i % 5)), f"{WORDS[i]} {WORDS[2 * i]}")
        for i in range(16)
    ]
