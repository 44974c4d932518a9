"""The pages as a reader uses them: every block runs, every command parses, every error is there.

A Python block that cannot run is preceded by ``<!-- not run: reason -->``, or listed here with the
reason. Blocks find a tiny model, a configuration and data under the names that readers have them by.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lorainit import errors
from lorainit.cli.parser import build_parser
from tests.adapters import tiny
from tests.life.mixtures import mixtral
from tests.life.sft import texts, tokenizer

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if p.is_file())
BLOCK = re.compile(r"^(?P<note><!--[^\n]*-->\n)?```(?P<kind>\w+)\n(?P<code>.*?)^```", re.M | re.S)


NOT_RUN = {
    "Trainer(model=model, ...)": "a sketch; tests/life/test_trainer.py resumes in both ways",
    'lorainit.export(model, "served"': "goes on from the sketch; tests/adapters/test_export.py",
    "dist.init_process_group": "needs several processes; tests/distributed",
    "BitsAndBytesConfig": "needs bitsandbytes",
}
"""Blocks by a text in them, with the reason."""


def surroundings(folder: Path) -> dict[str, object]:
    """What a page may take as given."""
    import peft

    import lorainit
    from lorainit.data import load_batches

    words = tokenizer()
    data = load_batches(folder / "train.jsonl", words)
    return {
        "lorainit": lorainit,
        "LoraConfig": peft.LoraConfig,
        "tokenizer": words,
        "model": tiny.llama(),
        "base_model": tiny.llama(),
        "mixture": mixtral(),
        "config": tiny.config(),
        "data": data,
        "dataloader": data,
        "needs": lorainit.LoraDA.needs,
        "rank": 0,
    }


def blocks(page: Path, kind: str) -> list[tuple[int, str]]:
    """Line and text of every block of this kind that is to run."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        if match["kind"] != kind:
            continue
        reason = re.fullmatch(r"<!-- not run: (.+) -->\n", match["note"] or "")
        if reason is None and not any(text in match["code"] for text in NOT_RUN):
            found.append((text[: match.start("code")].count("\n"), match["code"]))
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("docs")
    tiny.llama().save_pretrained(place / "model")
    tokenizer().save_pretrained(place / "model")
    lines = [json.dumps({"prompt": q + " ", "completion": a}) for q, a in texts()]
    (place / "train.jsonl").write_text("\n".join(lines))
    return place


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_python_blocks_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    module = type(sys)("page")
    monkeypatch.setitem(sys.modules, "page", module)
    vars(module).update(surroundings(folder))
    for line, code in blocks(page, "python"):
        # Padded, so that a traceback shows the page's own line.
        exec(compile("\n" * (line) + code, str(page), "exec"), module.__dict__)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=name)
def test_commands_parse(page: Path) -> None:
    for _, code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["lorainit"] and not any("..." in word for word in words):
                build_parser().parse_args(words[1:])


def messages() -> dict[str, list[str]]:
    """By the class raised, the constant parts of every message in the sources."""
    found: dict[str, list[str]] = {}
    for file in (ROOT / "src" / "lorainit").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                kind = getattr(node.exc.func, "id", "")
                parts = [
                    n.value
                    for n in ast.walk(node.exc)
                    if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                found.setdefault(kind, []).append(" ".join(parts))
    return found


def test_every_error_has_its_section() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^## (\w+)$", page, re.M))
    ours = {kind for kind, value in vars(errors).items() if isinstance(value, type)}
    assert ours - {"LorainitError"} <= sections
    assert ours >= {kind for kind in messages() if kind.endswith("Error")} - {
        "AttributeError", "KeyError", "MissingExtraError", "OSError", "TypeError", "ValueError",
    }  # fmt: skip


def test_quoted_messages_are_the_programs_own() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    strings = []
    for file in (ROOT / "src" / "lorainit").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                strings.append(
                    "".join(
                        str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    everything = "\n".join(" ".join(s.split()) for s in strings).lower()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(quoted) > 50
    for message in quoted:
        for part in message.lower().split("…"):
            assert part.strip() in everything, f"no error says {message!r}"


def test_every_method_has_a_page() -> None:
    import lorainit

    pages = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "methods").glob("*"))
    for method in lorainit.METHODS.values():
        assert f"::: {method.__module__}.{method.__name__}\n" in pages


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Smallest eigenvectors" in (tmp_path / "methods" / "lora-da" / "index.html").read_text()
