"""Files mutated at random, and what may come of reading them: the package's own error, or nothing."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorainit
from lorainit.cli.parser import with_file
from lorainit.data import read_records
from lorainit.errors import LorainitError
from lorainit.report import read_curves
from tests.adapters import tiny

Reader = Callable[[Path], object]

ODD: list[Any] = [
    None, True, -1, 0, 10**400, 1e308, "", "\ud800", "x" * 300, [], {}, [[]], {"a": {"b": []}}, "nan",
    float("nan"), float("inf"), "../../x", "a\0b",
]  # fmt: skip
"""Values that belong nowhere."""


def subjects(
    folder: Path,
) -> dict[str, tuple[Path, list[str], Reader, tuple[type[Exception], ...]]]:
    """By name: a folder, its files to mutate, their reader, and what it may raise."""
    found: dict[str, tuple[Path, list[str], Reader, tuple[type[Exception], ...]]] = {}
    model = lorainit.get_peft_model(
        tiny.llama(), tiny.config(), method=lorainit.PiSSA(), progress=False
    )
    lorainit.save_adapter(model, folder / "adapter")

    def load(place: Path) -> None:
        """The folder is read and checked; PEFT's part costs a model each time."""
        from lorainit.adapters.folder_checks import one_error, readable_config, readable_weights
        from lorainit.adapters.origin import read_origin

        with one_error(place):
            config = readable_config(place)
            readable_weights(place)
            read_origin(place, config)

    names = ["adapter_config.json", "adapter_model.safetensors", "lorainit.json"]
    found["adapter"] = (folder / "adapter", names, load, (LorainitError,))
    statistics = lorainit.collect_statistics(
        tiny.llama(),
        tiny.config(),
        data=[tiny.batch()],
        needs=lorainit.Natural().needs,
        progress=False,
    )
    (folder / "statistics").mkdir()
    statistics.save(folder / "statistics" / "s.safetensors", max_shard_size="8KB")
    shards = sorted(p.name for p in (folder / "statistics").iterdir())
    found["statistics"] = (
        folder / "statistics", shards[:3] + ["s.safetensors.index.json"],
        lambda place: lorainit.Statistics.load(place / "s.safetensors"), (LorainitError,),
    )  # fmt: skip
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
    usual = (LorainitError, ValueError)
    found["records"] = (texts, ["d.jsonl"], lambda p: read_records(p / "d.jsonl"), (LorainitError,))
    found["options"] = (
        texts, ["c.yaml"], lambda p: with_file(["init", "--config", str(p / "c.yaml")]), usual
    )  # fmt: skip
    found["curves"] = (
        texts, ["trainer_state.json"], lambda p: read_curves(p / "trainer_state.json"), (LorainitError,)
    )  # fmt: skip
    return found


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


def fuzz(
    name: str,
    subject: tuple[Path, list[str], Reader, tuple[type[Exception], ...]],
    count: int,
    seed: int,
) -> tuple[int, list[str]]:
    """Mutations that were refused, and what came of the others that should not have."""
    source, names, read, allowed = subject
    draw = random.Random(seed)
    refused, broken = 0, []
    place = source.with_name(source.name + "-mutated")
    for number in range(count):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        file = place / draw.choice(names)
        file.write_bytes(mutate(file.read_bytes(), draw))
        before = sorted(p.name for p in place.iterdir())
        try:
            read(place)
        except allowed as error:
            refused += 1
            if len(str(error)) > 2000:
                broken.append(f"{name} {number}: a message of {len(str(error))} characters")
        except Exception as error:
            broken.append(
                f"{name} {number}, {file.name}: {type(error).__name__}: {str(error)[:200]}"
            )
        if sorted(p.name for p in place.iterdir()) != before:
            broken.append(f"{name} {number}: files were written")
    return refused, broken
