"""Conversations as token ids, and which of them the assistant says.

The tokens are those of TRL's ``SFTTrainer`` with ``assistant_only_loss=True``: the template's own
``{% generation %}`` marks decide; a template without them is replaced by the one that TRL trains the
same model with, where TRL is installed and has one. For all others the assistant's tokens are the
difference between the conversation with and without its message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lorainit.errors import DataError, first_line

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_TRAINING_TEMPLATES: dict[str, str | None] = {}
"""What TRL trains with, by the template that it replaces."""


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
class ChatTemplate:
    """A tokenizer's chat template with what one record says of it.

    Attributes:
        tokenizer: whose template it is.
        tools: functions that the model may call, as JSON schemas; None: none.
        settings: further variables of the template.
    """

    tokenizer: Tokenizer
    tools: list[Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def for_record(cls, record: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate:
        """With the record's ``tools`` (a list, or its JSON text) and ``chat_template_kwargs``.

        Raises:
            DataError: the tokenizer has no chat template, or either field is none of these.
        """
        if tokenizer.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template, which messages need. Give a model that was tuned "
                "on chats, or records with prompt and completion."
            )
        tools, settings = record.get("tools"), record.get("chat_template_kwargs") or {}
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except ValueError:
                tools = 0
        if not (tools is None or isinstance(tools, list)) or not isinstance(settings, Mapping):
            raise DataError(
                "'tools' must be a list of JSON schemas, or that list as a text, and "
                "'chat_template_kwargs' an object."
            )
        return cls(tokenizer, tools, settings)

    def ids(self, messages: Sequence[Any], *, add_generation_prompt: bool = False) -> list[int]:
        """Token ids of a conversation.

        Raises:
            DataError: the template refuses it.
        """
        extra = {"add_generation_prompt": True} if add_generation_prompt else {}
        return list(self._applied(messages, **extra)["input_ids"])

    def assistant_labels(
        self, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and for each whether the assistant says it.

        Raises:
            DataError: the template refuses the conversation, or there is no telling.
        """
        own = _default_of(self.tokenizer.chat_template)
        training = None if _marks(own) else _training_template(self.tokenizer, own)
        if training is not None or _marks(own):
            extra = {} if training is None else {"chat_template": training}
            found = self._applied(messages, return_assistant_tokens_mask=True, **extra)
            return list(found["input_ids"]), [bool(m) for m in found["assistant_masks"]]
        return self._by_differences(messages)

    def _applied(self, messages: Sequence[Any], **extra: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=True,
                return_dict=True,
                tools=self.tools,
                **{**self.settings, **extra},
            )
        except Exception as error:  # whatever a template raises, jinja2's errors among it
            raise DataError(
                f"the chat template cannot write it ({first_line(error)}). Write the messages as the "
                "template wants them."
            ) from error

    def _by_differences(
        self, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[list[int], list[bool]]:
        whole = self.ids(messages)
        said = [False] * len(whole)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._start(messages, index, whole)
            until = self.ids(messages[: index + 1])
            end = common_length(until, whole)
            # What ends every conversation, as an end token after the last message, is no part of it.
            ending = until[end:]
            if start is None or (ending and whole[-len(ending) :] != ending) or start > end:
                raise DataError(
                    "the chat template writes a message otherwise when others follow, so the "
                    "assistant's tokens cannot be told. Mark them in the template with "
                    "{% generation %} ... {% endgeneration %}, or give prompt and completion."
                )
            said[start:end] = [True] * (end - start)
        return whole, said

    def _start(
        self, messages: Sequence[Mapping[str, Any]], index: int, whole: list[int]
    ) -> int | None:
        """Where message `index` begins to be the assistant's own: after the generation prompt.

        As in TRL, what of the generation prompt the conversation has otherwise is the assistant's.
        """
        try:
            asked = self.ids(messages[:index], add_generation_prompt=True)
            plain = self.ids(messages[:index])
        except DataError:
            # Nothing comes before it that the template can write: find the prompt that it writes later.
            until = self.ids(messages[: index + 1])
            asked = self.ids(messages[: index + 1], add_generation_prompt=True)
            prompt = asked[common_length(until, asked) :]
            places = range(len(until) - len(prompt) + 1)
            found = (p for p in places if prompt and whole[p : p + len(prompt)] == prompt)
            first = next(found, None)
            return None if first is None else first + len(prompt)
        start = common_length(asked, whole)
        return start if start >= common_length(asked, plain) else None


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def _default_of(template: Any) -> str:
    """Of a template in several variants, the one that is taken where nothing is said."""
    if isinstance(template, Mapping):
        template = template.get("default", "")
    return str(template)


def _marks(template: str) -> bool:
    return _GENERATION.search(template) is not None


def _training_template(tokenizer: Tokenizer, template: str) -> str | None:
    """What TRL replaces the template by for training, if it is there and knows it."""
    if template not in _TRAINING_TEMPLATES:
        try:
            from trl.chat_template_utils import get_training_chat_template

            _TRAINING_TEMPLATES[template] = get_training_chat_template(tokenizer)
        except Exception:  # no TRL, an older one, or a template that it does not know
            _TRAINING_TEMPLATES[template] = None
    return _TRAINING_TEMPLATES[template]
