"""Draw the package's rooms and the imports between them: ``python tools/draw_rooms.py``.

Writes docs/images/rooms.svg. A room is a folder or a module in the package's root. Rooms stand in rows so that
every import points down; the script fails where one does not. With ``--check`` nothing is written, and a
drawing that is not current is an error.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "lorainit"
DRAWING = ROOT / "docs" / "images" / "rooms.svg"

ROWS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("integrations",),
    ("report", "trainers"),
    ("pipeline",),
    ("calibration",),
    ("solve",),
    ("statistics", "adapters"),
    ("methods", "data", "models"),
    ("parallel",),
    ("linalg", "files"),
    ("types",),
    ("errors",),
)
"""From the top."""

WORDS = {
    "cli": "the commands",
    "report": "a page about statistics and starts",
    "integrations": "a file a tool, when asked for",
    "trainers": "start_trainer, on a trainer's own batches",
    "pipeline": "get_peft_model, collect_statistics",
    "calibration": "lengths and steps, measured",
    "solve": "many layers at once, ranks",
    "statistics": "hooks, losses, memory plan, files",
    "adapters": "targets, weights, PEFT's layers, export",
    "methods": "one file a method",
    "data": "batches, sampling, records",
    "models": "displacement, experts, state",
    "linalg": "factors, eigenvectors, singular vectors",
    "parallel": "collectives, exchange",
    "files": "written whole or not at all",
    "types": "statistics, factors, protocols",
    "errors": "each with its remedy",
}

WIDTH, HEIGHT, BOX, STEP = 900, 46, 270, 78


def room_of(module: str) -> str | None:
    """The room of a dotted module name; None outside the package, or for its own root."""
    parts = module.split(".")
    return parts[1] if parts[0] == "lorainit" and len(parts) > 1 else None


def imports(path: Path, package: Path = PACKAGE) -> Iterable[str]:
    """Dotted names that a file imports, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == package.name:
                yield from (f"{package.name}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def arrows(package: Path = PACKAGE) -> Counter[tuple[str, str]]:
    """How many files of the first room import the second."""
    found: Counter[tuple[str, str]] = Counter()
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        if len(inside.parts) == 1 and inside.stem in ("__init__", "_version"):
            # The package's front imports names when they are used.
            continue
        room = inside.parts[0].removesuffix(".py")
        for other in {room_of(name) for name in imports(path, package)} - {None, room}:
            found[room, str(other)] += 1
    return found


def upward(found: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Imports that do not point down."""
    place = {room: number for number, row in enumerate(ROWS) for room in row}
    return [
        (room, other)
        for room, other in found
        if other != "_version" and place.get(room, 99) >= place.get(other, -1)
    ]


def direct(found: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The imports that no chain of others implies."""
    below: dict[str, set[str]] = {}
    for room, other in found:
        below.setdefault(room, set()).add(other)

    def reached(room: str) -> set[str]:
        return {other for one in below.get(room, ()) for other in {one} | reached(one)}

    return sorted(
        (room, other)
        for room, others in below.items()
        for other in others
        if not any(other in reached(one) for one in others - {other})
    )


def draw(found: Counter[tuple[str, str]]) -> str:
    """The drawing as SVG; what a chain of arrows implies has no arrow of its own."""
    centre: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(ROWS):
        for index, room in enumerate(row):
            x = WIDTH * (index + 0.5) / len(row)
            centre[room] = (x, 40 + number * STEP)
    height = len(ROWS) * STEP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        "<title>The rooms of the package and the imports between them</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#7a8a99"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for room, other in direct(found):
        if other not in centre or room not in centre:
            continue
        (x1, y1), (x2, y2) = centre[room], centre[other]
        start, end = y1 + HEIGHT / 2, y2 - HEIGHT / 2
        count = found[room, other]
        lines.append(
            f'<path d="M{x1:.0f} {start:.0f}C{x1:.0f} {start + 30:.0f} {x2:.0f} {end - 30:.0f} '
            f'{x2:.0f} {end:.0f}" fill="none" stroke="#7a8a99" stroke-width="1.5" '
            f'marker-end="url(#tip)"><title>{room} imports {other} in {count} file(s)</title></path>'
        )
    for room, (x, y) in centre.items():
        lines += [
            f'<rect x="{x - BOX / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{BOX}" height="{HEIGHT}" rx="6" '
            'fill="#e6f2f1" stroke="#00695c"/>',
            f'<text x="{x:.0f}" y="{y - 3:.0f}" text-anchor="middle" font-size="16" font-weight="bold" '
            f'fill="#10302d">{room}</text>',
            f'<text x="{x:.0f}" y="{y + 15:.0f}" text-anchor="middle" font-size="11.5" fill="#37474f">'
            f"{WORDS[room]}</text>",
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    """Write the drawing, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    found = arrows()
    if wrong := upward(found):
        sys.exit(f"imports that point up: {', '.join(f'{a} -> {b}' for a, b in wrong)}")
    text = draw(found)
    if not options.check:
        DRAWING.write_text(text, encoding="utf-8")
    elif not DRAWING.is_file() or DRAWING.read_text(encoding="utf-8") != text:
        sys.exit("docs/images/rooms.svg is not current: run python tools/draw_rooms.py")


if __name__ == "__main__":
    main()
