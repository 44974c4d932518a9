"""Files mutated at random, and what may come of reading them: the package's own error, or nothing."""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lorainit
from lorainit.cli.loading import load_model, load_tokenizer
from lorainit.cli.parser import with_file
from lorainit.data import read_records
from lorainit.errors import LorainitError
from lorainit.models.place import check_place
from lorainit.report import read_curves
from tests.adapters import tiny
from tests.cli.place import make_place
from tests.faults.file_operations import writing
from tests.faults.states import content_of, differences, state_of

KNOWN = (LorainitError, ValueError, OSError, ImportError, MemoryError)
"""What a command turns into one line."""

ODD: list[Any] = [
    None, True, -1, 0, 10**400, 1e308, "", "\ud800", "x" * 300, [], {}, [[]], {"a": {"b": []}}, "nan",
    float("nan"), float("inf"), "../../x", "a\0b",
]  # fmt: skip
"""Values that belong nowhere."""


@dataclass(frozen=True)
class Subject:
    """Files that somebody may have damaged.

    Attributes:
        folder: of the whole files.
        names: those to mutate.
        read: what is done with a folder of them.
        allowed: what it may raise.
    """

    folder: Path
    names: list[str]
    read: Callable[[Path], object]
    allowed: tuple[type[Exception], ...] = (LorainitError,)


def subjects(folder: Path) -> dict[str, Subject]:
    """By name; the whole files are made in `folder`."""
    started = lorainit.get_peft_model(
        tiny.llama(), tiny.config(), method=lorainit.PiSSA(), progress=False
    )
    lorainit.save_adapter(started, folder / "adapter")
    collected = lorainit.collect_statistics(
        tiny.llama(),
        tiny.config(),
        data=[tiny.batch()],
        needs=lorainit.Natural().needs,
        progress=False,
    )
    (folder / "statistics").mkdir()
    collected.save(folder / "statistics" / "s.safetensors", max_shard_size="8KB")
    shards = sorted(p.name for p in (folder / "statistics").iterdir())
    shutil.copytree(make_place(folder) / "model", folder / "base")
    texts = folder / "texts"
    texts.mkdir()
    (texts / "d.jsonl").write_text(
        json.dumps({"prompt": "a", "completion": "b"}) + "\n" + json.dumps({"text": "é"}) + "\n"
    )
    (texts / "c.yaml").write_text(
        "model: m\nrank: 8\nset:\n  damping: 0.1\ntarget_modules: [q, v]\n"
    )
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0}]
    (texts / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    base = tiny.llama()

    def load(place: Path) -> None:
        before = state_of(base)
        try:
            loaded = lorainit.load_adapter(base, place)
        except Exception:
            changed = differences(before, state_of(base))
            assert not changed, changed[:3]
            raise
        loaded.unload()
        for parameter in base.parameters():
            parameter.requires_grad_(True)
        vars(base).pop("_hf_peft_config_loaded", None)
        vars(base).pop("peft_config", None)

    def load_base(place: Path) -> None:
        options = argparse.Namespace(
            model=str(place), device="cpu", dtype="auto", trust_remote_code=False
        )
        check_place(options.model)
        load_tokenizer(options)
        load_model(options)

    adapter = ["adapter_config.json", "adapter_model.safetensors", "lorainit.json"]
    return {
        "adapter": Subject(folder / "adapter", adapter, load),
        "statistics": Subject(
            folder / "statistics",
            [*shards[:3], "s.safetensors.index.json"],
            lambda place: lorainit.Statistics.load(place / "s.safetensors"),
        ),
        "records": Subject(texts, ["d.jsonl"], lambda p: read_records(p / "d.jsonl")),
        "options": Subject(
            texts, ["c.yaml"], lambda p: with_file(["init", "--config", str(p / "c.yaml")]), KNOWN
        ),
        "curves": Subject(
            texts, ["trainer_state.json"], lambda p: read_curves(p / "trainer_state.json")
        ),
        "base model": Subject(
            folder / "base",
            ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"],
            load_base,
            KNOWN,
        ),
    }


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut, doubled; or a value of a JSON text replaced by one that belongs nowhere."""
    kind = draw.randrange(6)
    if kind == 5 and (changed := _in_json(content, draw)) is not None:
        return changed
    place = draw.randrange(len(content) + 1)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + draw.randbytes(draw.randint(1, 8)) + content[place:]
    if kind == 2:
        return content[:place] + content[place + draw.randint(1, 40) :]
    if kind == 3:
        return content + content[place:]
    held = bytearray(content)
    # Headers and beginnings are where meaning lies.
    for _ in range(draw.randint(1, 4)):
        held[min(int(draw.expovariate(0.003)), len(held) - 1)] = draw.randrange(256)
    return bytes(held)


def _in_json(content: bytes, draw: random.Random) -> bytes | None:
    try:
        table = json.loads(content)
    except ValueError:
        return None
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    if isinstance(table, dict | list):
        walk(table)
    if not places:
        return None
    holder, key = draw.choice(places)
    holder[key] = draw.choice(ODD)
    text = json.dumps(table)
    return text.encode()


@dataclass
class Mutated:
    """What came of reading a mutated file: refused, and what should not have been."""

    refused: bool = False
    broken: list[str] = field(default_factory=list)


def mutated(name: str, subject: Subject, number: int, seed: int) -> Mutated:
    """Mutate one of the subject's files and read it; the same for the same number and seed."""
    draw = random.Random(f"{seed} {name} {number}")
    place = subject.folder.with_name(subject.folder.name + "-mutated")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(subject.folder, place)
    file = place / draw.choice(subject.names)
    file.write_bytes(mutate(file.read_bytes(), draw))
    found = Mutated()
    before = content_of(place)
    written: list[str] = []
    try:
        with writing(written):
            subject.read(place)
    except subject.allowed as error:
        found.refused = True
        if len(str(error)) > 2000:
            found.broken.append(f"a message of {len(str(error))} characters")
    except Exception as error:
        found.broken.append(f"{file.name}: {type(error).__name__}: {str(error)[:200]}")
    if content_of(place) != before:
        found.broken.append("files were changed")
    found.broken += [f"written: {path}" for path in written]
    return found


def fuzz(name: str, subject: Subject, count: int, seed: int) -> tuple[int, list[str]]:
    """Mutations that were refused, and what came of the others that should not have."""
    every = [mutated(name, subject, number, seed) for number in range(count)]
    broken = [f"{name} {i}: {what}" for i, found in enumerate(every) for what in found.broken]
    return sum(found.refused for found in every), broken
