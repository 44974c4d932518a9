"""Every operation on every kind of layer and of start is right, refused with the remedy, or as in PEFT.

What is right is computed in float64 from the base weights and ``s (B A - B0 A0)``. One table says what each
cell is (`operation_table`), and the table of docs/adapters.md is made of it.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorainit.errors import LorainitError
from tests.adapters.operation_table import (
    ELSEWHERE,
    TABLE,
    AsPeft,
    Exact,
    Refused,
    Row,
    cells,
    rendered,
)
from tests.adapters.started import KINDS, STARTS, Case, build, out, product, relative, twin

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
BEGIN, END = "<!-- operations: begin -->\n", "\n<!-- operations: end -->"


def largest(pairs: Any) -> float:
    return max(relative(found, expected) for found, expected in pairs)


@pytest.mark.parametrize(("name", "kind", "start"), cells())
def test_cell(name: str, kind: str, start: str, tmp_path: Path) -> None:
    row = TABLE[name]
    verdict, case = row.verdict(kind, start), build(kind, start, row.ranks)
    if isinstance(verdict, Exact):
        assert largest(row.run(case, tmp_path)) < row.tolerance
    elif isinstance(verdict, Refused):
        with pytest.raises(LorainitError, match=verdict.remedy):
            row.run(case, tmp_path)
        assert relative(out(case.model), case.dense("default")) < 1e-5
    else:
        as_in_peft(row, case, tmp_path)


def as_in_peft(row: Row, case: Case, folder: Path) -> None:
    """The same result as of a plain adapter with the same numbers, which is not the right one."""
    plain = twin(build(case.kind, case.start, row.ranks))
    expected, found = attempt(row, plain, folder / "plain"), attempt(row, case, folder / "own")
    if isinstance(expected, str):
        assert found == expected
        return
    assert not isinstance(found, str)
    assert largest(expected) > 100 * row.tolerance
    for (own, _), (stock, _) in zip(found, expected, strict=True):
        assert relative(own, stock) < row.tolerance


def attempt(row: Row, case: Case, folder: Path) -> Any:
    """What an operation gives, or its error, without what differs from one run to another."""
    try:
        return row.run(case, folder)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"


# Negative controls


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_compared_depends_on_every_factor(kind: str, start: str) -> None:
    case = build(kind, start)
    right = case.dense("default")
    assert relative(case.dense(), right) > 0.1
    if start == "anchored":
        # Without taking the start away it is another model; the start itself is the base.
        whole = {name: product(kind, name, *pair) for name, pair in case.trained["default"].items()}
        assert relative(case.dense_of([whole]), right) > 0.1
        assert torch.equal(case.dense_of([case.begun["default"]]), case.dense())
    else:
        assert (relative(case.dense_of([case.begun["default"]]), case.dense()) > 0.1) == (
            start == "displaced"
        )


@pytest.mark.parametrize("name", TABLE)
def test_a_wrong_factor_is_seen(name: str, tmp_path: Path) -> None:
    """A cell fails where the adapter has other numbers than those that the right result is made of."""
    row = TABLE[name]
    if not isinstance(row.verdict("linear", "anchored"), Exact):
        pytest.skip("not exact on linear layers")
    case = build("linear", "anchored", row.ranks)
    if name in ("`unload`", "`reset_lora_parameters`"):
        found = row.run(case, tmp_path)
        assert all(relative(own, case.dense("default")) > 100 * row.tolerance for own, _ in found)
        return
    if name == "AdamW's state, in numbers":
        case = replace(case, trained={"default": twice_the_rank(case)})
    else:
        case = replace(case, changes=other(case.changes), trained=others(case.trained))
    assert largest(row.run(case, tmp_path)) > 2 * row.tolerance


def other(changes: Any) -> Any:
    return {a: {name: 1.2 * delta for name, delta in of.items()} for a, of in changes.items()}


def others(trained: Any) -> Any:
    return {
        adapter: {name: (1.1 * a, 1.1 * b) for name, (a, b) in of.items()}
        for adapter, of in trained.items()
    }


def twice_the_rank(case: Case) -> Any:
    """As if the anchor were a parameter."""
    return {
        name: (torch.cat([a, a]), torch.cat([b, b], dim=1))
        for name, (a, b) in case.trained["default"].items()
    }


# The page


def test_the_page_has_the_table() -> None:
    """To write it anew: ``python -m tests.adapters.test_operations``."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == rendered()


@pytest.mark.parametrize("where", [where for _, where in ELSEWHERE.values()])
def test_what_is_tested_elsewhere_is_there(where: str) -> None:
    path, _, test = where.partition("::")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert callable(getattr(module, test))


def test_every_verdict_is_seen() -> None:
    found = {type(TABLE[name].verdict(kind, start)) for name, kind, start in cells()}
    assert found == {Exact, AsPeft, Refused}


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + rendered() + END + rest.partition(END)[2], encoding="utf-8")
