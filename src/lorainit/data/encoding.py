"""A record as token ids and labels: prompt and completion, chats, or plain text, with the prompt masked.

A record is one line of the file, in one of the forms that TRL knows::

    {"prompt": "2 + 2 =", "completion": " 4"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"text": "All of this is learned."}

Prompt and completion may be lists of messages too, ``conversations`` with ``from`` and ``value`` are
messages, and a record of messages may have ``tools`` and ``chat_template_kwargs``. What is not to be
learned, the prompt or what the assistant did not say, has label -100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorainit.data.chat import ChatTemplate, Tokenizer, common_length
from lorainit.errors import DataError, first_line
from lorainit.types import IGNORED


@dataclass(frozen=True)
class Example:
    """One sequence: its token ids, and the ids that are learned, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]

    @property
    def teaches(self) -> bool:
        """Whether any of it is learned."""
        return any(label != IGNORED for label in self.labels)


def encode(record: Mapping[str, Any], tokenizer: Tokenizer, max_length: int = 1024) -> Example:
    """A record as token ids and labels, cut to `max_length` tokens.

    Ids and labels are those of TRL's ``SFTTrainer``, with ``assistant_only_loss=True`` for messages.

    Raises:
        DataError: none of the forms above, a text that the tokenizer or a conversation that the chat
            template cannot write, or a template by which the assistant's part cannot be told.
    """
    if "prompt" in record and "completion" in record:
        example = _completion(record, tokenizer)
    elif "messages" in record or "conversations" in record:
        messages = _messages(record["messages" if "messages" in record else "conversations"])
        ids, said = ChatTemplate.for_record(record, tokenizer).assistant_labels(messages)
        example = Example(ids, [i if s else IGNORED for i, s in zip(ids, said, strict=True)])
    else:
        check_form(record)
        ids = _ids(tokenizer, _ended(record["text"], tokenizer))
        example = Example(ids, list(ids))
    return Example(example.input_ids[:max_length], example.labels[:max_length])


def check_form(record: Mapping[str, Any]) -> None:
    """Raise ``DataError`` where a record is none of the forms above."""
    pair = "prompt" in record and "completion" in record
    if pair or "messages" in record or "conversations" in record:
        return
    if not isinstance(record.get("text"), str):
        raise DataError(
            f"the record has the keys {', '.join(map(repr, record)) or '(none)'}. It must have "
            "'prompt' and 'completion', or 'messages', or 'text'."
        )


def _completion(record: Mapping[str, Any], tokenizer: Tokenizer) -> Example:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        before = _ids(tokenizer, prompt)
        whole = _ids(tokenizer, prompt + _ended(completion, tokenizer))
    elif isinstance(prompt, list) and isinstance(completion, list):
        template = ChatTemplate.for_record(record, tokenizer)
        prompt, completion = _messages(prompt), _messages(completion)
        before = template.ids(prompt, add_generation_prompt=True)
        whole = template.ids([*prompt, *completion])
    else:
        raise DataError("prompt and completion must both be texts, or both lists of messages.")
    # A token that spans the border, or an end token after the prompt, is the completion's.
    start = common_length(before, whole)
    return Example(whole, [IGNORED] * start + whole[start:])


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return list(tokenizer(text)["input_ids"])
    except Exception as error:  # whatever readers of the many kinds of tokenizers raise
        raise DataError(f"the tokenizer cannot read its text ({first_line(error)}).") from error


def _ended(text: str, tokenizer: Tokenizer) -> str:
    """The text with one end token."""
    end = tokenizer.eos_token
    return text if not end or text.endswith(end) else text + end


def _messages(messages: object) -> list[dict[str, Any]]:
    """Messages with 'role' and 'content', also of those with 'from' and 'value'."""
    found = []
    for message in messages if isinstance(messages, list) else []:
        renamed = dict(message) if isinstance(message, Mapping) else {}
        for old, new in (("from", "role"), ("value", "content")):
            if old in renamed:
                renamed[new] = renamed.pop(old)
        found.append(renamed)
    # A message may be calls of tools alone.
    if not found or not all("role" in m and ("content" in m or "tool_calls" in m) for m in found):
        raise DataError("messages must be a list of objects with 'role' and 'content'.")
    return found
