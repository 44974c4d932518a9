"""Learning curves from the files that training leaves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorainit.errors import DataError

STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes:
        name: of the run.
        points: step and loss, by step; only finite losses.
        held_out: whether the loss is that of data which is not trained on.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    held_out: bool = False


def read_curves(path: str | os.PathLike[str], name: str | None = None) -> list[Curve]:
    """The curves of a file or folder.

    Args:
        path: a Trainer's ``trainer_state.json``, its output folder or a ``checkpoint-*`` of it, or the
            file that ``lorainit compare --output`` wrote.
        name: of the run; None: the folder's. The runs of a comparison have names already.

    Raises:
        DataError: nothing there, or no losses in it.
    """
    file = _file_of(Path(path))
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"'{file}' cannot be read as JSON ({error}). Give {_WHAT}.") from None
    try:
        curves = _curves(content, file, name)
    except DataError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise DataError(f"'{file}' holds a learning curve that is damaged. Give {_WHAT}.") from None
    if not curves:
        raise DataError(f"'{file}' holds no losses. Train with a smaller logging_steps.")
    return curves


def _curves(content: Any, file: Path, name: str | None) -> list[Curve]:
    if isinstance(content, dict) and isinstance(content.get("log_history"), list):
        folder = file.parent
        parent = folder.parent if folder.name.startswith("checkpoint-") else folder
        return of_log(content["log_history"], name or parent.name or "run")
    if isinstance(content, dict) and isinstance(content.get("best"), dict):
        return of_comparison(content, name)
    raise DataError(f"'{file}' holds no learning curve. Give {_WHAT}.")


_WHAT = f"a Trainer's {STATE_FILE} or folder, or what 'lorainit compare --output' wrote"


def of_log(log: Sequence[Mapping[str, Any]], name: str) -> list[Curve]:
    """Training and evaluation losses of a Trainer's ``state.log_history``."""
    curves = []
    for key, held_out in (("loss", False), ("eval_loss", True)):
        points = _points((entry.get("step"), entry.get(key)) for entry in log)
        if points:
            curves.append(Curve(name, points, held_out))
    return curves


def of_comparison(result: Mapping[str, Any], name: str | None = None) -> list[Curve]:
    """Every method's best run, of what ``lorainit compare`` gives."""
    curves = []
    for method, best in result["best"].items():
        label = f"{method}, {best['rate']:.2g}" if name is None else f"{name}: {method}"
        held = _points(best.get("curve", ()))
        trained = _points(enumerate(best.get("train_losses", ()), 1))
        curves += [Curve(label, held, held_out=True)] if held else []
        curves += [Curve(label, trained)] if trained else []
    return curves


def _points(pairs: Any) -> tuple[tuple[float, float], ...]:
    found = {}
    for step, loss in pairs:
        if isinstance(step, int | float) and isinstance(loss, int | float) and math.isfinite(loss):
            found[float(step)] = float(loss)
    return tuple(sorted(found.items()))


def _file_of(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / STATE_FILE).is_file():
        return path / STATE_FILE
    checkpoints = [f for f in path.glob(f"checkpoint-*/{STATE_FILE}") if _step(f) >= 0]
    if checkpoints:
        return max(checkpoints, key=_step)
    raise DataError(f"there is no learning curve at '{path}'. Give {_WHAT}.")


def _step(file: Path) -> int:
    number = file.parent.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
