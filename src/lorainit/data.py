"""JSON lines as batches: prompt and completion, chats, or plain text, with the prompt masked.

A record is one line of the file, in one of the forms that TRL knows::

    {"prompt": "2 + 2 =", "completion": " 4"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"text": "All of this is learned."}

Prompt and completion may be lists of messages too. What is not to be learned, the prompt or what the
assistant did not say, has label -100.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lorainit.errors import DataError, MissingExtraError

IGNORED = -100

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.%:\[\]+-]+)?(?<!\.jsonl)(?<!\.json)")
"""``owner/name``, with a split perhaps; a relative path of a JSON file is none."""


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


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a file of JSON lines (empty lines are passed over), or of a data set by name.

    Args:
        path: of a file; or ``OWNER/NAME`` or ``OWNER/NAME:SPLIT`` on the Hugging Face hub (the split
            is ``train`` unless said), which the package ``datasets`` loads.

    Raises:
        DataError: no such file or data set, no records, or a line that is no JSON object.
        MissingExtraError: a name is given, and ``datasets`` is not installed.
    """
    if _HUB_NAME.fullmatch(str(path)) and not Path(path).is_file():
        return _from_hub(str(path))
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no data file '{path}'. Give a file of JSON lines.")
    records = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    records.append(_record(line, path, number))
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is no UTF-8 text ({error}). Give a file of JSON lines."
        ) from None
    if not records:
        raise DataError(f"'{path}' holds no records. Give a file of JSON lines.")
    return records


def _from_hub(name: str) -> list[dict[str, Any]]:
    place, _, split = name.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(
            f"there is no data file '{name}', and to read a data set of that name from the hub the "
            "package 'datasets' is needed: install it with pip install 'lorainit[train]'"
        ) from error
    try:
        found = [dict(record) for record in load_dataset(place, split=split or "train")]
    except Exception as error:  # whatever the hub, the network or the files' readers raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"there is no data file '{name}', and the hub gave no data set of that name ({first}). "
            "Look at the name, the split and the network, or give a file of JSON lines."
        ) from error
    if not found:
        raise DataError(f"the data set '{name}' holds no records. Give another split.")
    return found


def _record(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        where = f"{error.msg.removesuffix(' at')}, column {error.colno}"
        raise DataError(
            f"'{path}', line {number}, is no JSON ({where}). Write one JSON object a line."
        ) from None
    if not isinstance(record, dict):
        raise DataError(
            f"'{path}', line {number}, is a {type(record).__name__}. Write one JSON object a line."
        )
    return record


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


class Records(Dataset[Example]):
    """Records, encoded when they are asked for, in an order drawn from `seed` (None: as they are)."""

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        max_length: int = 1024,
        seed: int | None = None,
    ) -> None:
        self.order = list(range(len(records)))
        if seed is not None:
            random.Random(seed).shuffle(self.order)
        self.records = records
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        number = self.order[index]
        try:
            return encode(self.records[number], self.tokenizer, self.max_length)
        except DataError as error:
            raise DataError(f"record {number + 1}: {error}") from error


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Sequences padded on the right, as keyword arguments of a causal language model."""
    length = max(len(e.input_ids) for e in examples)
    ids = torch.full((len(examples), length), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        ids[row, :size] = torch.tensor(example.input_ids)
        labels[row, :size] = torch.tensor(example.labels)
        mask[row, :size] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def load_batches(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    seed: int | None = 0,
) -> DataLoader[Any]:
    """A file of JSON lines as a loader for `get_peft_model` and `collect_statistics`.

    Args:
        path: of the file.
        tokenizer: of the model; its chat template decides what of a chat is learned.
        batch_size: sequences a batch. Statistics do not depend on it.
        max_length: longer sequences are cut to so many tokens.
        seed: of the order in which records are taken, the same at every call; None: as they stand
            in the file.

    Returns:
        A loader of ``input_ids``, ``attention_mask`` and ``labels``, padded on the right; it knows
        its number of records, which LoRA-DA reads.
    """
    records = Records(read_records(path), tokenizer, max_length=max_length, seed=seed)
    return batches_of(records, batch_size)


def batches_of(records: Dataset[Example], batch_size: int) -> DataLoader[Any]:
    """A loader of padded batches over records, or a part of them."""
    source = records
    while not isinstance(source, Records):
        source = source.dataset  # type: ignore[attr-defined]
    tokenizer = source.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def together(examples: list[Example]) -> dict[str, Tensor]:
        return collate(examples, pad or 0)

    return DataLoader(records, batch_size=batch_size, collate_fn=together)
