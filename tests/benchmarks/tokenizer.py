"""A stand-in for a tokenizer: one token a byte, so the tests download nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ByteTokenizer:
    pad_token_id: int = 0
    eos_token_id: int = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        del add_special_tokens
        return {"input_ids": [2 + byte for byte in text.encode()]}

    def __len__(self) -> int:
        return 258
