from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lorainit.data import collate, encode, load_batches, read_records
from lorainit.data.loading import Records
from lorainit.errors import DataError, MissingExtraError
from tests.life.words import TEMPLATE, tokenizer

CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]


def learned(example: object, tok: object) -> str:
    ids = [i for i in example.labels if i != -100]
    return tok.decode(ids)


def test_only_the_completion_is_learned() -> None:
    tok = tokenizer()
    example = encode({"prompt": "w1 w2 ", "completion": "w3 w4 "}, tok)
    assert tok.decode(example.input_ids) == "w1 w2 w3 w4 <eos>"
    assert learned(example, tok) == "w3 w4 <eos>"


def test_all_of_a_text_is_learned() -> None:
    example = encode({"text": "w1 w2 "}, tokenizer())
    assert example.labels == example.input_ids


def test_chat_masks_agree_with_and_without_generation_marks() -> None:
    marked, plain = tokenizer(), tokenizer()
    plain.chat_template = TEMPLATE.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    first, second = (encode({"messages": CHAT}, tok) for tok in (marked, plain))
    assert first.input_ids == second.input_ids
    assert learned(second, plain) == "w3 <eos> w5 w6 <eos>"
    assert learned(first, marked) == learned(second, plain)


def test_conversational_prompt_and_completion() -> None:
    tok = tokenizer()
    example = encode({"prompt": CHAT[:3], "completion": CHAT[3:]}, tok)
    assert learned(example, tok) == "w5 w6 <eos>"


def test_a_template_that_rewrites_history_is_refused() -> None:
    tok = tokenizer()
    tok.chat_template = (
        "{% for m in messages %}{% if not loop.last and m['role'] == 'assistant' %}w9 "
        "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="generation"):
        encode({"messages": CHAT}, tok)


def test_padding_and_cut() -> None:
    tok = tokenizer()
    rows = [encode({"text": t}, tok, 3) for t in ("w1 ", "w1 w2 w3 w4")]
    batch = collate(rows, 0)
    assert batch["input_ids"].shape == (2, 3)
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"][0, 2] == -100


def test_order_is_the_seeds(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("".join(f'{{"text": "w{i}"}}\n' for i in range(20)))

    def ids(seed: int | None) -> list[int]:
        loader = load_batches(file, tokenizer(), seed=seed)
        assert len(loader.dataset) == 20
        return [int(i) for batch in loader for i in batch["input_ids"][:, 0]]

    assert ids(0) == ids(0) != ids(1)
    assert ids(None) == sorted(ids(0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no records"),
        ('{"text": "a"}\n{"text"\n', "line 2, is no JSON"),
        ("[1]\n", "line 1, is a list"),
        ('{"question": "a"}\n', "'question'"),
        ('{"messages": []}\n', "'role' and 'content'"),
        ('{"prompt": "a", "completion": 3}\n', "both be texts"),
    ],
)
def test_bad_files_are_named(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        list(load_batches(file, tokenizer()))


def test_what_a_template_refuses_is_one_line_with_the_record(tmp_path: Path) -> None:
    """A record that the template writes, and one that it does not."""
    tok = tokenizer()
    tok.chat_template = (
        "{{ raise_exception('No system\nhere') if messages[0].role == 'system' }}" + (TEMPLATE)
    )
    system = [{"role": "system", "content": "w1"}, *CHAT]
    for form in ({"messages": system}, {"prompt": system[:-1], "completion": CHAT[-1:]}):
        file = tmp_path / "d.jsonl"
        lines = [json.dumps(record) + "\n" for record in ({"messages": CHAT}, form)]
        file.write_text("".join(lines))
        with pytest.raises(DataError, match=r"^record 2: .*No system\)") as caught:
            list(load_batches(file, tok, seed=None))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"tools": "[{"}, {"tools": 3}, {"chat_template_kwargs": "a"}])
def test_bad_fields_beside_messages_are_named(change: dict[str, object]) -> None:
    with pytest.raises(DataError, match="'tools' must be a list"):
        encode({"messages": CHAT} | change, tokenizer())


def test_the_first_record_of_another_form_is_named_before_any_is_read() -> None:
    """In the file's order, whatever order the seed draws; an index counts from one."""
    good, wrong = {"text": "a b"}, {"question": "a", "answer": "b"}
    for place in (0, 3, 9):
        records = [good] * place + [wrong] * (12 - place)
        for seed in (0, 1, None):
            with pytest.raises(DataError, match=rf"^record {place + 1}: .*'question', 'answer'"):
                Records(records, tokenizer(), seed=seed)
    assert len(Records([good] * 3, tokenizer(), seed=0)) == 3


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"text": "w1"}\n')
    assert read_records(file) == [{"text": "w1"}]


def test_messages_need_a_template() -> None:
    tok = tokenizer()
    tok.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode({"messages": CHAT}, tok)


def test_a_data_set_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a folder of that name as it reads the hub's, split and all."""
    pytest.importorskip("datasets")
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for split, count in (("train", 5), ("test", 3)):
        lines = [f'{{"text": "w{i}"}}\n' for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert [r["text"] for r in read_records("owner/name")] == [f"w{i}" for i in range(5)]
    assert len(read_records("owner/name:test")) == 3
    assert len(read_records("owner/name:train[:2]")) == 2
    with pytest.raises(DataError, match="gave no data set of that name"):
        read_records("owner/name:nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="pip install 'lorainit"):
        read_records("owner/name")
    with pytest.raises(DataError, match="no data file"):
        read_records("data/train.jsonl")
