"""The drawing of the rooms is current, and imports point down."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def rooms() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_rooms", ROOT / "tools" / "draw_rooms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawing_is_current(rooms: ModuleType) -> None:
    drawn = (ROOT / "docs" / "images" / "rooms.svg").read_text(encoding="utf-8")
    found = rooms.arrows()
    assert rooms.draw(found) == drawn
    # The negative control: another import is another drawing.
    found["types", "errors"] += 1
    assert rooms.draw(found) != drawn


def test_imports_point_down(rooms: ModuleType) -> None:
    found = rooms.arrows()
    assert len(found) > 30
    assert rooms.upward(found) == []
    assert rooms.upward([("types", "cli"), ("cli", "types")]) == [("types", "cli")]


def test_every_room_is_drawn(rooms: ModuleType) -> None:
    package = ROOT / "src" / "lorainit"
    there = {p.name for p in package.iterdir() if (p / "__init__.py").is_file()} | {"errors"}
    assert there == {room for row in rooms.ROWS for room in row} == set(rooms.WORDS)


def test_files_are_read_in_one_sitting() -> None:
    lengths = sorted(
        len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "src" / "lorainit").rglob("*.py")
    )
    assert lengths[-1] <= 350
    assert lengths[len(lengths) // 2] <= 150
    loose = {path.stem for path in (ROOT / "src" / "lorainit").glob("*.py")}
    assert loose <= {"__init__", "_version", "pipeline", "types", "errors"}
    folders = [p for p in (ROOT / "src" / "lorainit" / "statistics").rglob("*") if p.is_dir()]
    assert all(len(list(folder.glob("*.py"))) <= 8 for folder in folders)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Circles of imports, each by the way that it is first found."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for other in sorted(edges.get(name, ())):
                walk(other, [*way, name])
            done.add(name)

    for name in sorted(edges):
        walk(name, [])
    return found


def test_no_circle_of_imports(rooms: ModuleType) -> None:
    """Of files, imports inside functions included; a package's front counts as a file of its own."""
    source = ROOT / "src"
    files = {
        ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (source / "lorainit").rglob("*.py")
    }
    edges = {
        name: {other for other in rooms.imports(path) if other in files} - {name}
        for name, path in files.items()
        # It imports names when they are used.
        if name != "lorainit"
    }
    for name, path in files.items():
        # "from a.b import c" may be of the module a.b.c.
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] == ["from"] and len(words) > 3 and words[1] in files:
                members = {f"{words[1]}.{word.strip('(),')}" for word in words[3:]} & set(files)
                if members and name in edges:
                    edges[name] = (edges[name] - {words[1]}) | members
    assert circles(edges) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]
