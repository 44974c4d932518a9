"""A model folder and data files, made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.adapters import tiny
from tests.life.sft import texts, tokenizer


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tiny.llama().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    with (folder / "pairs.jsonl").open("w") as pairs, (folder / "chats.jsonl").open("w") as chats:
        for question, answer in texts() * 2:
            pairs.write(json.dumps({"prompt": question + " ", "completion": answer}) + "\n")
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            chats.write(json.dumps({"messages": messages}) + "\n")
    return folder
