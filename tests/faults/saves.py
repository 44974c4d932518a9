"""Saves of every kind over an older one, and what a folder may be afterwards."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import lorainit
from lorainit.cli.main import main
from lorainit.files.aside import is_aside
from lorainit.files.atomic import write_text
from tests.adapters import tiny
from tests.cli.place import make_place
from tests.faults import file_operations


@dataclass(frozen=True)
class Save:
    """A save, most of them over an older one.

    Attributes:
        first: makes what is there before; nothing, for a folder that is empty.
        again: the save under test.
        loads: raises `LorainitError` where there is nothing to load.
    """

    first: Callable[[Path], object]
    again: Callable[[Path], object]
    loads: Callable[[Path], object]


def started(method: Any, **settings: Any) -> PeftModel:
    config = tiny.config(**settings)
    return lorainit.get_peft_model(tiny.llama(), config, method=method, progress=False)


def statistics(seed: int) -> lorainit.Statistics:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        f"l{i}": lorainit.LayerStatistics.from_means(
            gradient=torch.randn(4, 6, generator=generator)
        )
        for i in range(4)
    }
    return lorainit.Statistics(layers)


def nothing(folder: Path) -> None:
    """Before the first save."""


def saves(made: Path) -> dict[str, Save]:
    """By name; models are made once, a model's folder in `made`."""
    anchored = started(lorainit.PiSSA())
    plain = started(lorainit.Vanilla(), r=3, lora_alpha=7)

    def load(folder: Path) -> None:
        lorainit.load_adapter(tiny.llama(), folder)

    def page(text: str) -> Callable[[Path], None]:
        return lambda folder: write_text(folder / "page.html", text)

    def read_page(folder: Path) -> str:
        return (folder / "page.html").read_text()

    def save(seed: int, size: int | str) -> Callable[[Path], None]:
        return lambda folder: statistics(seed).save(folder / "s.safetensors", max_shard_size=size)

    def read(folder: Path) -> None:
        lorainit.Statistics.load(folder / "s.safetensors")

    adapter = {
        "anchored over plain": (plain, anchored),
        "plain over anchored": (anchored, plain),
    }
    found = {
        f"save, {name}": Save(
            lambda folder, m=first: lorainit.save_adapter(m, folder),
            lambda folder, m=second: lorainit.save_adapter(m, folder),
            load,
        )
        for name, (first, second) in adapter.items()
    }
    found["export over a start"] = Save(
        lambda folder: lorainit.save_adapter(anchored, folder),
        lambda folder: lorainit.export(anchored, folder, rank=2),
        load,
    )
    read_by_commands = make_place(made)

    def command(line: str, output: str = ".") -> Callable[[Path], None]:
        """No backward pass: a process that has run one cannot be forked to run another."""

        def run(folder: Path) -> None:
            words = line.format(read_by_commands / "pairs.jsonl").split()
            model = str(read_by_commands / "model")
            code = main(
                [
                    *words,
                    "--model",
                    model,
                    "--output",
                    str(folder / output),
                    "--quiet",
                    "--device",
                    "cpu",
                ]
            )
            assert code in (0, 1, 130), code

        return run

    adapters = [lambda folder, m=m: lorainit.save_adapter(m, folder) for m in (plain, anchored)]
    exported = [lambda folder, r=r: lorainit.export(anchored, folder, rank=r) for r in (3, 2)]
    init = [command(f"init --method {m}") for m in ("pissa --rank 4", "olora --rank 3 --alpha 9")]
    collected = [
        command(f"collect --method {m} --data {{}}", "s.safetensors") for m in ("eva", "corda")
    ]

    found["save, new"] = Save(nothing, adapters[1], load)
    found["export, new"] = Save(nothing, exported[1], load)
    found["export over export"] = Save(exported[0], exported[1], load)
    found["init, new"] = Save(nothing, init[1], load)
    found["init over init"] = Save(init[0], init[1], load)
    found["init over a save"] = Save(adapters[0], init[1], load)
    found["collect, new"] = Save(nothing, collected[1], read)
    found["collect over collect"] = Save(collected[0], collected[1], read)
    found["statistics, new"] = Save(nothing, save(1, "1GB"), read)
    found["statistics, new shards"] = Save(nothing, save(1, 100), read)
    found["page over page"] = Save(page("old"), page("new"), read_page)
    found["statistics, file over file"] = Save(save(0, "1GB"), save(1, "1GB"), read)
    found["statistics, shards over shards"] = Save(save(0, 100), save(1, 100), read)
    found["statistics, shards over file"] = Save(save(0, "1GB"), save(1, 100), read)
    found["statistics, file over shards"] = Save(save(0, 100), save(1, "1GB"), read)
    return found


def content(folder: Path) -> dict[str, bytes]:
    """Every file's, those aside left out; shards and what names them by their place, not their name."""
    if (folder / "s.safetensors").exists() or (folder / "s.safetensors.index.json").exists():
        loaded = lorainit.Statistics.load(folder / "s.safetensors")
        return {f"{n} {f}": v for n, s in loaded.items() for f, v in _values(s).items()}
    return {p.name: p.read_bytes() for p in folder.iterdir() if not is_aside(p.name)}


def _values(statistics: lorainit.LayerStatistics) -> dict[str, bytes]:
    values = {f.name: getattr(statistics, f.name) for f in dataclasses.fields(statistics)}
    return {
        name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
        for name, value in values.items()
    }


def left_aside(folder: Path) -> list[str]:
    return [
        p.name for place in (folder, folder.parent) for p in place.iterdir() if is_aside(p.name)
    ]


@dataclass(frozen=True)
class Case:
    """A save that is about to be disturbed.

    Attributes:
        save: what is done.
        folder: where to.
        old: what was there before.
        new: what it writes.
        operations: how many file operations it takes.
    """

    save: Save
    folder: Path
    old: dict[str, bytes]
    new: dict[str, bytes]
    operations: int

    @classmethod
    def of(cls, save: Save, place: Path) -> Case:
        folder = place / "w" / "f"
        folder.mkdir(parents=True)
        save.first(folder)
        shutil.copytree(folder, place / "before")
        old = content(folder)
        operations = file_operations.count(lambda: save.again(folder), folder)
        return cls(save, folder, old, content(folder), operations)

    def work(self) -> None:
        self.save.again(self.folder)

    def afresh(self) -> None:
        """What was there before is there again."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.folder.parent.parent / "before", self.folder)

    def numbers(self, most: int | None) -> list[int]:
        """Operations to disturb: all, or the first, the last and some between."""
        every = list(range(1, self.operations + 1))
        if most is None or len(every) <= most:
            return every
        return sorted({every[round(i * (len(every) - 1) / (most - 1))] for i in range(most)})


def check_after(case: Case, *, died: bool) -> str:
    """The folder is the old or the new one; after a kill it may be one that nobody can load."""
    try:
        found = content(case.folder)
    except lorainit.errors.LorainitError:
        found = {}
    kind = "old" if found == case.old else "new" if found == case.new else "neither"
    if kind == "neither":
        assert died, sorted(found)
        assert "adapter_config.json" not in found
        assert not _loads(case), "a folder that is neither the old one nor the new one loads"
    case.work()
    assert content(case.folder) == case.new
    assert not left_aside(case.folder)
    return kind


def _loads(case: Case) -> bool:
    try:
        case.save.loads(case.folder)
    except lorainit.errors.LorainitError:
        return False
    return True
