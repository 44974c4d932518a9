"""A save is whole, or has not been: at every file operation a full disk, an interrupt, a kill."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import lorainit
from lorainit.files.aside import Aside, is_aside, sweep
from lorainit.files.folder import replaced_files
from tests.adapters import tiny
from tests.faults import file_operations
from tests.faults.saves import Case, Save, check_after, content, saves, statistics

SAVES = (
    "save, new", "export, new", "init over init", "collect over collect", "save, anchored over plain",
    "save, plain over anchored", "export over a start", "page over page", "statistics, file over file",
    "statistics, shards over shards", "statistics, shards over file", "statistics, file over shards",
)  # fmt: skip
"""``python -m tools.faults kills`` takes the others too, and every operation."""


FAILURES = {
    "full disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "interrupt": KeyboardInterrupt,
}


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Save]:
    found = saves(tmp_path_factory.mktemp("made"))
    assert set(found) > set(SAVES)
    return found


@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("kind", sorted(FAILURES))
def test_a_failure_leaves_the_old_or_the_new(
    kind: str, name: str, every: dict[str, Save], tmp_path: Path
) -> None:
    case = Case.of(every[name], tmp_path)
    assert case.operations >= 2
    kinds = set()
    for number in case.numbers(4):
        case.afresh()
        file_operations.failing(case.work, case.folder, number, FAILURES[kind]())
        kinds.add(check_after(case, died=False))
    assert "old" in kinds


@pytest.mark.parametrize("name", SAVES)
def test_a_kill_leaves_the_old_the_new_or_nothing_to_load(
    name: str, every: dict[str, Save], tmp_path: Path
) -> None:
    case = Case.of(every[name], tmp_path)
    kinds = []
    for number in case.numbers(6):
        case.afresh()
        assert file_operations.dying(case.work, case.folder, number)
        kinds.append(check_after(case, died=True))
    assert kinds[0] == "old"
    assert not file_operations.dying(case.work, case.folder, 10 * case.operations)


def test_files_written_in_place_are_found_mixed(every: dict[str, Save], tmp_path: Path) -> None:
    """The negative control: what writes into the folder itself is old and new at once."""

    def unsafe(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"new weights")
        (folder / "adapter_config.json").write_text("new")

    save = every["save, plain over anchored"]
    case = Case.of(Save(save.first, unsafe, save.loads), tmp_path)
    found = []
    for number in case.numbers(None):
        case.afresh()
        assert file_operations.dying(case.work, case.folder, number)
        found.append(content(case.folder) in (case.old, case.new))
    assert not all(found)


@pytest.mark.parametrize("name", [n for n in SAVES if n.startswith(("page", "statistics"))])
@pytest.mark.parametrize("where", ["in", "after"])
def test_an_interrupt_right_after_the_last_renaming_takes_nothing_away(
    where: str, name: str, every: dict[str, Save], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old file is gone by then: the new one must stay, with all its shards."""
    case = Case.of(every[name], tmp_path)
    number = sum(is_new(aside) for aside in renamings(case, monkeypatch))
    case.afresh()
    left = [number]
    function = os.replace if where == "in" else Aside.put

    def last(*given: Any, **named: Any) -> None:
        function(*given, **named)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(*((os, "replace") if where == "in" else (Aside, "put")), last)
    with pytest.raises(KeyboardInterrupt):
        case.work()
    monkeypatch.undo()
    # What counts until the other one is removed, the file or the index, may be the old one.
    assert check_after(case, died=False) in ("old", "new")


def renamings(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda *given: (found.append(str(given[0])), replace(*given))
    )
    case.work()
    monkeypatch.undo()
    return found


def is_new(path: str) -> bool:
    return is_aside(Path(path).name)


def test_files_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = {"w": torch.ones(3)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    shards = tmp_path / "m"
    tiny.llama().save_pretrained(shards, max_shard_size="20KB")
    assert (shards / "model.safetensors.index.json").is_file()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for path in (
        tmp_path / "model.safetensors",
        tmp_path / "data.jsonl",
        shards / "model.safetensors",
        shards / "config.json",
    ):
        with pytest.raises(OSError, match="not written over"):
            statistics(0).save(path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_index_that_names_other_files_removes_none(tmp_path: Path) -> None:
    import json

    path = tmp_path / "s.safetensors"
    statistics(0).save(path, max_shard_size=100)
    index = tmp_path / "s.safetensors.index.json"
    table = json.loads(index.read_text())
    token = "s-0123456789abcdef-00001-of-00001.safetensors"
    mine = {name: tmp_path / name for name in ("notes.txt", "s-notes.safetensors", token)}
    for file in mine.values():
        file.write_text("mine")
    table["weight_map"] |= {f"extra/{name}": name for name in mine}
    index.write_text(json.dumps(table))
    statistics(1).save(path)
    assert all(file.read_text() == "mine" for file in mine.values())
    # And its own shards are gone.
    assert len(list(tmp_path.iterdir())) == 1 + len(mine)


def test_nothing_is_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "f"
    folder.mkdir()
    names = iter(["a" * 32, "b" * 32])
    monkeypatch.setattr("lorainit.files.aside.secrets.token_hex", lambda n: next(names))
    (folder / f".lorainit-{'a' * 32}.aside").symlink_to(victim)
    with pytest.raises(FileExistsError):
        Aside(folder)
    aside = Aside(folder)
    aside.discard()
    sweep(folder)
    assert victim.read_text() == "precious"
    monkeypatch.undo()
    assert len({Aside(folder).path for _ in range(4)}) == 4


def test_a_writer_at_work_is_not_swept(tmp_path: Path) -> None:
    aside = Aside(tmp_path)
    sweep(tmp_path)
    assert aside.path.exists()
    aside.close()
    sweep(tmp_path)
    assert not aside.path.exists()


@pytest.mark.parametrize("size", [100, "1GB"])
def test_threads_that_save_one_path(size: int | str, tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def save(seed: int) -> None:
        try:
            for _ in range(5):
                statistics(seed).save(tmp_path / "s.safetensors", max_shard_size=size)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    found = lorainit.Statistics.load(tmp_path / "s.safetensors")["l0"].gradient
    assert any(torch.equal(found, statistics(seed)["l0"].gradient) for seed in range(4))
    statistics(7).save(tmp_path / "s.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_what_the_users_umask_leaves(mask: int, tmp_path: Path) -> None:
    wrapped = saves_of_an_adapter()
    before = os.umask(mask)
    try:
        lorainit.export(wrapped, tmp_path / "e")
        lorainit.save_adapter(wrapped, tmp_path / "s")
        lorainit.save_adapter(wrapped, tmp_path / "s")
        statistics(0).save(tmp_path / "s.safetensors")
    finally:
        os.umask(before)
    modes = {p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()}
    assert modes == {0o666 & ~mask}


def saves_of_an_adapter() -> PeftModel:
    return lorainit.get_peft_model(
        tiny.llama(), tiny.config(), method=lorainit.PiSSA(), progress=False
    )


def test_a_folder_on_another_disk_is_written_in_place(tmp_path: Path) -> None:
    """Nothing is renamed into the folder from outside: a mount point, or a link, serves."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    seen: list[Path] = []
    with replaced_files(tmp_path / "link", key="k") as aside:
        seen.append(aside)
        (aside / "k").write_text("new")
    assert seen[0].parent == tmp_path / "link"
    assert (tmp_path / "elsewhere" / "k").read_text() == "new"
    assert (tmp_path / "link").is_symlink()
    assert not any(is_aside(p.name) for p in (tmp_path / "elsewhere").iterdir())


def test_other_files_and_the_model_card_stay(tmp_path: Path) -> None:
    wrapped = saves_of_an_adapter()
    lorainit.save_adapter(wrapped, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    card = (tmp_path / "README.md").read_text() + "\nmine\n\nyours"
    (tmp_path / "README.md").write_text(card)
    lorainit.save_adapter(wrapped, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "\nmine\n" in (tmp_path / "README.md").read_text()
    torch.testing.assert_close(
        tiny.logits(PeftModel.from_pretrained(tiny.llama(), tmp_path)), tiny.logits(wrapped)
    )
