"""Ids and labels of every form of record under many chat templates are TRL's."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", minversion="1.0")
from trl import chat_template_utils

from lorainit.data import encode
from lorainit.errors import DataError
from tests.records.bytes_tokenizer import tokenizer
from tests.records.trl_tokens import prepared

pytestmark = pytest.mark.filterwarnings("ignore")

FOLDER = Path(chat_template_utils.__file__).parent / "chat_templates"
OF_TRL = [
    "cohere", "deepseekv3", "gemma", "gemma3", "glm4moe", "gptoss", "llama3", "phi3", "qwen2_5",
    "qwen2_5_training", "qwen3", "qwen3_5_think",
]  # fmt: skip
OWN = {
    "marked, no end token": "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}"
    "{% if m.role == 'assistant' %}{%- generation -%}{{ m.content }}{%- endgeneration -%}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "marked, end token at the end": "{% for m in messages %}{{ m.role + ': ' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% if loop.last %}"
    "{{ eos_token }}{% endif %}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "marked, with tools": "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": {"type": "object"}},
}


def said(*texts: str, system: str | None = None, first: str = "user") -> list[dict[str, Any]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": said("hello", " world "),
    "two turns": said("hello", "world", "what is two plus two", "two\n"),
    "system": said("hello", "world", system="the weather is fine"),
    "assistant first": said("hello", "world", "two", first="assistant"),
    "user last": said("hello", "world", "two"),
}


def template(name: str) -> str:
    return OWN[name] if name in OWN else (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def both(record: dict[str, Any], tok: Any, **settings: Any) -> tuple[Any, Any]:
    """Ours and TRL's, each ids and labels or the error's type."""
    assistant = "prompt" not in record and "text" not in record
    try:
        (theirs,) = prepared([copy.deepcopy(record)], tok, assistant=assistant)
    except Exception as error:
        theirs = type(error)
    ours: Any = DataError
    with contextlib.suppress(DataError):
        example = encode(record, tok)
        ours = (example.input_ids, example.labels)
    return ours, theirs


@pytest.mark.parametrize("name", [*OF_TRL, *OWN])
def test_messages(name: str) -> None:
    """Where TRL refuses a conversation, as it does a system message or an order, so do we."""
    tok = tokenizer(template(name))
    written = 0
    for kind, messages in CHATS.items():
        ours, theirs = both({"messages": messages}, tok)
        if isinstance(theirs, type):
            assert ours is DataError, kind
            continue
        assert ours == theirs, kind
        assert any(label != -100 for label in ours[1])
        assert any(label == -100 for label in ours[1])
        written += 1
    assert written >= 2


@pytest.mark.parametrize("name", [*OF_TRL, *OWN])
def test_prompt_and_completion_as_messages(name: str) -> None:
    tok = tokenizer(template(name))
    for kind in ("one turn", "two turns"):
        messages = CHATS[kind]
        ours, theirs = both({"prompt": messages[:-1], "completion": messages[-1:]}, tok)
        assert ours == theirs, kind


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "marked, with tools"])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_written_into_every_form(name: str, as_text: bool) -> None:
    import json

    tok = tokenizer(template(name))
    tools: Any = json.dumps([TOOL]) if as_text else [TOOL]
    messages = said("what is the weather in Paris", "fine")
    for record in ({"messages": messages}, {"prompt": messages[:1], "completion": messages[1:]}):
        ours, theirs = both(record | {"tools": tools}, tok)
        assert ours == theirs
        # The negative control: without tools it is another sequence.
        assert len(ours[0]) > len(encode(record, tok).input_ids) + 20


def test_calls_of_tools_without_content() -> None:
    tok = tokenizer(template("marked, with tools"))
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    messages = [
        {"role": "user", "content": "weather"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "fine"},
        {"role": "assistant", "content": "fine"},
    ]
    with_none = [{"tool_calls": None} | message for message in messages]
    ours, theirs = both({"messages": with_none, "tools": [TOOL]}, tok)
    assert ours == theirs
    assert ours[0] == encode({"messages": messages, "tools": [TOOL]}, tok).input_ids
    del messages[1]["content"]
    encode({"messages": messages}, tok)


def test_settings_of_the_template_come_from_the_record() -> None:
    tok = tokenizer(template("qwen3"))
    record = {"prompt": said("hello"), "completion": said("hello", "world")[1:]}
    off = record | {"chat_template_kwargs": {"enable_thinking": False}}
    for each in (record, off):
        ours, theirs = both(each, tok)
        assert ours == theirs
    assert encode(off, tok).labels != encode(record, tok).labels


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize(
    "record",
    [
        {"text": "hello world"},
        {"text": "hello world</s>"},
        {"text": ""},
        {"prompt": "hello ", "completion": "world"},
        {"prompt": "hello", "completion": " world "},
        {"prompt": "hello", "completion": "world</s>"},
        {"prompt": "what is tw", "completion": "o plus two"},
        {"prompt": "", "completion": "world"},
    ],
)
def test_texts(record: dict[str, Any], strips: bool) -> None:
    """White space that the tokenizer drops, a token over the border, an end token that is there."""
    ours, theirs = both(record, tokenizer(strips=strips))
    assert ours == theirs
    assert ours[0].count(tokenizer().eos_token_id) == 1


def test_conversations_in_the_form_of_from_and_value() -> None:
    tok = tokenizer(template("qwen2_5"))
    record = {
        "conversations": [{"from": m["role"], "value": m["content"]} for m in CHATS["two turns"]]
    }
    ours, theirs = both(record, tok)
    assert ours == theirs == both({"messages": CHATS["two turns"]}, tok)[1]


def test_a_template_in_variants() -> None:
    default, tools = template("qwen2_5_training"), template("marked, with tools")
    tok = tokenizer({"default": default, "tool_use": tools})
    for extra in ({}, {"tools": [TOOL]}):
        ours, theirs = both({"messages": CHATS["two turns"]} | extra, tok)
        assert ours == theirs


@pytest.mark.parametrize("name", ["llama3_1", "gemma4_v2", "phi3"])
def test_templates_without_marks_that_nobody_knows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL refuses them for messages: the last answer is its completion, each earlier one that of its
    own beginning, and an end token after the last message is the last one's."""
    monkeypatch.setattr("lorainit.data.chat._TRAINING_TEMPLATES", {template(name): None})
    tok = tokenizer(template(name))
    messages = CHATS["two turns"]
    example = encode({"messages": messages}, tok)
    last = encode({"prompt": messages[:-1], "completion": messages[-1:]}, tok)
    assert example.input_ids == last.input_ids
    answers = [
        tok.decode([i for i in e.labels if i != -100])
        for e in (encode({"prompt": messages[:1], "completion": messages[1:2]}, tok), last)
    ]
    # The end of a whole conversation stands once, at the end.
    first = answers[0].removesuffix("</s>")
    assert tok.decode([i for i in example.labels if i != -100]) == first + answers[1]


def test_an_answer_that_begins_is_found_where_nothing_knows_the_template() -> None:
    tok = tokenizer(
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content }}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}"
        "{% endif %}"
    )
    example = encode({"messages": CHATS["assistant first"]}, tok)
    learned = tok.decode([i for i in example.labels if i != -100])
    assert learned == "hello<|im_end|>two<|im_end|>"


def test_the_ground_truth_is_what_the_trainer_does(tmp_path: Path) -> None:
    from tests.adapters import tiny
    from tests.life import sft

    for form in ("completion", "chat"):
        trainer = sft.trainer(tiny.llama(), tmp_path, form)
        theirs = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
        records = list(sft.dataset(form))
        assert prepared(records, sft.tokenizer(), assistant=form == "chat") == theirs
        ours = [encode(record, sft.tokenizer()) for record in records]
        assert [(e.input_ids, e.labels) for e in ours] == theirs
