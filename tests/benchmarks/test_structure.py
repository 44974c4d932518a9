"""How the benchmarks are built: no circle of imports, no record without its script, files of one sitting."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.benchmarks.imports import circles, import_graph, modules

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
PACKAGE = ROOT / "src" / "lorainit"
LONGEST = 350
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile")),
    *(BENCHMARKS / "README.md", ROOT / "tests" / "life" / "README.md"),
    *sorted((ROOT / "docs").glob("**/*.md")),
]
"""What readers start from."""

RECORDS = {
    "architectures/results/architectures.jsonl": "architectures/tables.py",
    "methods_report/results/methods_report.json": "methods_report/__main__.py",
    "preference/results/preference.jsonl": "preference/__main__.py",
    "quality/results/records/*.jsonl": "quality/records.py",
    "quality/results/suggestions/*.jsonl": "quality/suggestions.py",
    "quality/results/suggested-rates.md": "quality/suggested.py",
    "quality/results/failures.jsonl": "quality/merge.py",
    "quality/results/tables.md": "quality/analyze.py",
    "quality/results/budgets-*.png": "quality/analyze.py",
    "quality/results/curves-*.png": "quality/analysis/figures.py",
    "quality/results/learning-rates-*.png": "quality/analysis/figures.py",
    "quality/results/speed-*.png": "quality/analyze.py",
    "quality/results/step_seconds.jsonl": "quality/step_time.py",
    "quantized/results/quantized.jsonl": "quantized/__main__.py",
    "quantized/results/optimality.jsonl": "quantized/optimality.py",
    "quantized/results/recovery*.jsonl": "quantized/recover.py",
    "quality/results/grid-*.md": "quality/compare_grid.py",
    "quality/results/rate-by-method-*.png": "quality/compare_grid.py",
    "scaling/results/scaling.json": "scaling/__main__.py",
    "speed/results/between_commits.jsonl": "speed/between_commits.py",
    "speed/results/blocks.jsonl": "speed/__main__.py",
    "speed/results/speed.jsonl": "speed/__main__.py",
    "speed/results/speed_cpu*.jsonl": "speed/__main__.py",
    "speed/results/whole_starts.jsonl": "speed/__main__.py",
    "studies/results/convolution_pass.json": "studies/convolution_pass.py",
    "studies/results/first_steps.jsonl": "studies/first_steps.py",
    "studies/results/new_heads.jsonl": "studies/new_heads.py",
    "studies/results/natural_steps.jsonl": "studies/natural_steps/__main__.py",
    "studies/results/precision.jsonl": "studies/precision/__main__.py",
    "studies/results/row_sizes.jsonl": "studies/row_sizes.py",
    "studies/results/solve_profile.jsonl": "studies/solve_profile.py",
    "studies/results/theory.json": "studies/theory/__main__.py",
    "studies/results/untrained_starts.jsonl": "studies/untrained_starts/evaluations.py",
}
"""Every kept record, by pattern, and the file that writes it or names it in its command."""


PUBLIC = {"adapters", "calibration", "data", "errors", "linalg", "methods", "report", "types"}
INTERNAL = {
    "quantized/quantizers.py": "finds a model's target layers, to quantize them",
    "quantized/peft_loftq.py": "loads whole models alone, as the command line does",
    "common/models.py": "loads whole models alone, as the command line does",
    "quality/models/registry.py": "loads whole models alone, as the command line does",
    "quality/models/vit.py": "loads whole models alone, as the command line does",
    "quality/suggested.py": "judges the law that is the package's own",
    "published/blocks.py": "judges the law that is the package's own",
    "published/rate_blocks.py": "judges it, too",
    "published/head_blocks.py": "how many sequences a head sees",
    "quality/initialization.py": "a head that goes another part of the way than the package's",
    "common/package_internals.py": "parts of a start, timed one by one",
    "quantized/bench.py": "what is checked is how the package reads a quantized weight",
    "studies/first_steps.py": "variants of how a learning rate is measured",
    "studies/precision/products.py": "counts products inside the iteration, and moves its goal",
    "studies/solver/__main__.py": "iterations at a tiny size",
    "studies/solver/operations.py": "times the package's own products and factorizations",
    "studies/solver/solves.py": "makes the dense solvers behind an iteration an error",
    "studies/theory/kl_curvature.py": "FILet's energy without its choice of directions",
}
"""Files that import what is not public, and why."""


def internal_imports(path: Path) -> list[str]:
    """Modules and members of the package that a file imports and that are not public."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Constant) and str(node.value).startswith("lorainit."):
            names = [(str(node.value), "")] if str(node.value).isprintable() else []
        else:
            continue
        for module, member in names:
            top, _, rest = module.partition(".")
            if top != "lorainit" or (member in PUBLIC and not rest):
                continue
            inside = PACKAGE.joinpath(*rest.split("."), member)
            is_module = bool(member) and (inside.is_dir() or inside.with_suffix(".py").is_file())
            if (rest and rest not in PUBLIC) or is_module:
                found.append(f"{module}.{member}")
    return found


def unexplained(root: Path, table: dict[str, str]) -> list[str]:
    """Files of ``results`` folders that no pattern of the table names."""
    kept = [p for p in sorted(root.rglob("results/**/*")) if p.is_file()]
    known = {path for pattern in table for path in root.glob(pattern)}
    return [str(path.relative_to(root)) for path in kept if path not in known]


def unfounded(root: Path, table: dict[str, str]) -> list[str]:
    """Patterns without a record, without a script, or whose script does not name the record."""
    found = []
    for pattern, script in table.items():
        path = root / script
        stem = Path(pattern).name.split("*")[0].partition(".")[0] or Path(pattern).parent.name
        named = path.is_file() and stem in path.read_text(encoding="utf-8")
        if not named or not list(root.glob(pattern)):
            found.append(pattern)
    return found


def test_no_benchmark_imports_itself_through_others() -> None:
    assert circles(import_graph(BENCHMARKS)) == []


@pytest.mark.parametrize("inside", [False, True], ids=["at the top", "inside a function"])
def test_a_circle_is_found(tmp_path: Path, inside: bool) -> None:
    package = tmp_path / "pack"
    (package / "deep").mkdir(parents=True)
    for folder in (package, package / "deep"):
        (folder / "__init__.py").write_text("")
    (package / "one.py").write_text("from pack.deep import two\n")
    (package / "deep" / "two.py").write_text("import pack.three\n")
    back = "from .one import value\n"
    (package / "three.py").write_text(f"def f():\n    {back}" if inside else back)
    (package / "four.py").write_text("from pack import one, three\n")
    assert circles(import_graph(package)) == [["pack.deep.two", "pack.one", "pack.three"]]
    (package / "three.py").write_text("")
    assert circles(import_graph(package)) == []


def test_every_record_has_its_script() -> None:
    assert unexplained(BENCHMARKS, RECORDS) == []
    assert unfounded(BENCHMARKS, RECORDS) == []


def test_a_record_without_a_script_is_found(tmp_path: Path) -> None:
    results = tmp_path / "study" / "results"
    results.mkdir(parents=True)
    (results / "a.jsonl").write_text("{}\n")
    (results / "b.jsonl").write_text("{}\n")
    script = tmp_path / "study" / "script.py"
    script.write_text('OUT = "a.jsonl"\n')
    table = {"study/results/a.jsonl": "study/script.py"}
    assert unexplained(tmp_path, table) == ["study/results/b.jsonl"]
    assert unfounded(tmp_path, table) == []
    table["study/results/b.jsonl"] = "study/script.py"
    assert unfounded(tmp_path, table) == ["study/results/b.jsonl"]
    script.unlink()
    assert unfounded(tmp_path, table) == list(table)


def test_only_named_files_know_what_is_not_public() -> None:
    found = {n: internal_imports(p) for n, p in modules(BENCHMARKS).items()}
    files = {str(modules(BENCHMARKS)[n].relative_to(BENCHMARKS)) for n, i in found.items() if i}
    assert files == set(INTERNAL)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("import lorainit\nfrom lorainit.types import LayerStatistics", 0),
        ("from lorainit import linalg, LoraDA", 0),
        ("from lorainit.methods import LoraDA", 0),
        ("from lorainit import pipeline", 1),
        ("def f():\n    from lorainit.linalg import leading", 1),
        ("import lorainit.pipeline", 1),
        ("from lorainit.adapters.weights import read_weight", 1),
        ("import_module('lorainit.statistics.collect')", 1),
    ],
)
def test_what_is_not_public(tmp_path: Path, text: str, count: int) -> None:
    path = tmp_path / "file.py"
    path.write_text(text + "\n")
    assert len(internal_imports(path)) == count


def missing(text: str) -> list[str]:
    """Paths and modules of benchmarks that a page names and that are not there."""
    paths = re.findall(r"(?<![\w./])benchmarks/[\w./-]*\w", text)
    commands = re.findall(r"-m (benchmarks[\w.]*\w)", text)
    gone = [path for path in paths if not (ROOT / path).exists()]
    for name in filter(lambda name: not name.rpartition(".")[2].isupper(), commands):
        place = ROOT / name.replace(".", "/")
        if not (place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()):
            gone.append(name)
    return gone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_what_is_there(page: Path) -> None:
    assert missing(page.read_text(encoding="utf-8")) == []


def test_what_a_page_names_and_is_not_there_is_found() -> None:
    text = (
        "`benchmarks/quality/old.jsonl`, `benchmarks/README.md`, `python -m benchmarks.old --out x`"
    )
    assert missing(text) == ["benchmarks/quality/old.jsonl", "benchmarks.old"]


def test_files_are_read_in_one_sitting() -> None:
    lengths = {n: len(p.read_text().splitlines()) for n, p in modules(BENCHMARKS).items()}
    assert [name for name, length in lengths.items() if length > LONGEST] == []
