"""What the commands read: a model folder, and data files."""

from __future__ import annotations

import json
from pathlib import Path

from tests.adapters import tiny
from tests.life.words import texts, tokenizer


def make_place(folder: Path) -> Path:
    """The folder, with ``model``, ``pairs.jsonl`` and ``chats.jsonl`` in it."""
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
