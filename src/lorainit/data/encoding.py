"""A record as token ids and labels: prompt and completion, chats, or plain text, with the prompt masked.

A record is one line of the file, in one of the forms that TRL knows::

    {"prompt": "2 + 2 =", "completion": " 4"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"text": "All of this is learned."}

Prompt and completion may be lists of messages too. What is not to be learned, the prompt or what the
assistant did not say, has label -100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorainit.errors import DataError
from lorainit.types import IGNORED


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers have it."""

    eos_token: str | None
    pad_token_id: int | None
    eos_token_id: int | None
    chat_template: Any

    def __call__(self, text: str) -> Mapping[str, Any]:
        """Token ids of a text under ``"input_ids"``."""

    def apply_chat_template(self, conversation: Any, **settings: Any) -> Any:
        """Messages as token ids."""


@dataclass(frozen=True)
class Example:
    """One sequence: its token ids, and the ids that are learned, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def encode(record: Mapping[str, Any], tokenizer: Tokenizer, max_length: int = 1024) -> Example:
    """A record as token ids and labels, cut to `max_length` tokens.

    Raises:
        DataError: none of the forms above, or a chat template by which the assistant's part of a
            chat cannot be told.
    """
    if "messages" in record:
        example = _chat(record["messages"], tokenizer)
    elif "prompt" in record and "completion" in record:
        example = _completion(record["prompt"], record["completion"], tokenizer)
    elif isinstance(record.get("text"), str):
        ids = _ids(tokenizer, record["text"] + (tokenizer.eos_token or ""))
        example = Example(ids, list(ids))
    else:
        raise DataError(
            f"the record has the keys {', '.join(map(repr, record)) or '(none)'}. It must have "
            "'prompt' and 'completion', or 'messages', or 'text'."
        )
    return Example(example.input_ids[:max_length], example.labels[:max_length])


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _completion(prompt: Any, completion: Any, tokenizer: Tokenizer) -> Example:
    if isinstance(prompt, str) and isinstance(completion, str):
        before = _ids(tokenizer, prompt)
        whole = _ids(tokenizer, prompt + completion + (tokenizer.eos_token or ""))
        # A token that spans the border, or an end token after the prompt, is the completion's.
        return _after(_common(before, whole), whole)
    if isinstance(prompt, list) and isinstance(completion, list):
        _check_messages([*prompt, *completion])
        before = _template(tokenizer, prompt, add_generation_prompt=True)
        whole = _template(tokenizer, [*prompt, *completion])
        return _after(_common(before, whole), whole)
    raise DataError("prompt and completion must both be texts, or both lists of messages.")


def _after(start: int, ids: list[int]) -> Example:
    return Example(ids, [IGNORED] * start + ids[start:])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def _check_messages(messages: object) -> None:
    good = isinstance(messages, list) and all(
        isinstance(m, Mapping) and "role" in m and "content" in m for m in messages
    )
    if not good or not messages:
        raise DataError("messages must be a list of objects with 'role' and 'content'.")


def _chat(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> Example:
    """What the assistant says is learned: marked by the template, or else told by differences."""
    _check_messages(messages)
    if _marks_assistant(tokenizer):
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = list(found["input_ids"]), found["assistant_masks"]
        return Example(ids, [i if m else IGNORED for i, m in zip(ids, mask, strict=True)])
    whole = _template(tokenizer, messages)
    labels = [IGNORED] * len(whole)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _template(tokenizer, messages[:index], add_generation_prompt=True)
        until = _template(tokenizer, messages[: index + 1])
        end = _common(until, whole)
        if _common(before, whole) < len(before) or end < len(until):
            raise DataError(
                "the chat template writes a message otherwise when others follow, so the "
                "assistant's tokens cannot be told. Mark them in the template with "
                "{% generation %} ... {% endgeneration %}, or give prompt and completion."
            )
        labels[len(before) : end] = whole[len(before) : end]
    return Example(whole, labels)


def _marks_assistant(tokenizer: Tokenizer) -> bool:
    template = tokenizer.chat_template
    if template is None:
        raise DataError(
            "the tokenizer has no chat template, which messages need. Give a model that was tuned "
            "on chats, or records with prompt and completion."
        )
    return isinstance(template, str) and "generation %}" in template.replace("-%}", "%}")


def _template(tokenizer: Tokenizer, messages: list[Any], **settings: Any) -> list[int]:
    _marks_assistant(tokenizer)
    found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **settings)
    return list(found["input_ids"])
