"""The pages as a reader uses them: every block runs, every command parses, every error is there.

A Python block that cannot run is preceded by ``<!-- not run: reason -->``, or listed here with the
reason. Blocks find a tiny model, a configuration and data under the names that readers have them by.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
import sys
import typing
from pathlib import Path

import peft
import pytest
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig

from lorainit import errors
from lorainit.cli.parser import build_parser
from tests.adapters import tiny
from tests.life.mixtures import mixtral
from tests.life.words import texts, tokenizer

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if p.is_file())
BLOCK = re.compile(r"^(?P<note><!--[^\n]*-->\n)?```(?P<kind>\w+)\n(?P<code>.*?)^```", re.M | re.S)


NOT_RUN = {
    "Trainer(model=model, ...)": "a sketch; tests/life/test_trainer.py resumes in both ways",
    'lorainit.export(model, "served"': "goes on from the sketch; tests/adapters/test_export.py",
    "dist.init_process_group": "needs several processes; tests/distributed",
}
"""Blocks by a text in them, with the reason."""


def surroundings(folder: Path) -> dict[str, object]:
    """What a page may take as given."""
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


def test_the_notebook_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    notebook = json.loads((ROOT / "examples" / "quick_start.ipynb").read_text(encoding="utf-8"))
    given = {"MODEL": folder / "model", "DATA": folder / "train.jsonl", "STEPS": 3}
    for key, value in given.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.chdir(tmp_path)
    cells: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), "quick_start.ipynb", "exec"), cells)
    assert float(cells["difference"]) < 1e-5  # type: ignore[arg-type]
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_what_is_not_run_is_there() -> None:
    everything = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [text for text in NOT_RUN if text not in everything]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=name)
def test_commands_parse(page: Path) -> None:
    for _, code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["lorainit"] and not any("..." in word for word in words):
                build_parser().parse_args(words[1:])


VALUE = "\0"
"""Stands for what a message's f-string fills in."""

_DAMAGED = "a damaged statistics file: caught, and named by StatisticsFileError"
_ALONE = "heads that cannot be fitted: caught, and said in the log"
INTERNAL = {
    "statistics/store/layer_table.py": _DAMAGED,
    "statistics/store/sharded_files.py": _DAMAGED,
    "statistics/store/packed_symmetric.py": _DAMAGED,
    "lorainit/models/heads.py": _ALONE,
    "calibration/head_loss.py": _ALONE,
    "lorainit/__init__.py": "AttributeError, in Python's own words",
}
"""Files whose raises reach no user as they are, with the reason."""

CAUGHT = {"its scales are not there": "by read_weight, which names the layer"}
"""The same for single messages."""


def text_of(node: ast.AST, constants: dict[str, ast.AST]) -> str:
    """The text that an expression gives; a name or a call is looked up in its module."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else VALUE for v in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left, constants) + text_of(node.right, constants)
    if isinstance(node, ast.IfExp):
        return text_of(node.body, constants) + VALUE + text_of(node.orelse, constants)
    name = getattr(node, "id", getattr(getattr(node, "func", None), "id", None))
    if name not in constants:
        return VALUE
    found = constants[name]
    if isinstance(found, ast.FunctionDef):
        returns = [n.value for n in ast.walk(found) if isinstance(n, ast.Return) and n.value]
        return VALUE.join(text_of(value, constants) for value in returns)
    return text_of(found, constants)


def messages() -> list[tuple[str, str, str]]:
    """Place, class and text of every ``raise`` in the sources that says something of its own."""
    found = []
    for file in sorted((ROOT / "src" / "lorainit").rglob("*.py")):
        if str(file).endswith(tuple(INTERNAL)):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        constants: dict[str, ast.AST] = {
            n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)
        }
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                constants[node.targets[0].id] = node.value
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            # raise made_by(a_function): its text is the function's own call's.
            call = constants.get(getattr(node.exc.func, "id", ""))
            made = node.exc
            if isinstance(call, ast.FunctionDef):
                made = next(
                    n.value for n in ast.walk(call)
                    if isinstance(n, ast.Return) and isinstance(n.value, ast.Call)
                )  # fmt: skip
            kind = getattr(made.func, "id", getattr(made.func, "attr", ""))
            text = " ".join(text_of(a, constants) for a in made.args).lower()
            if text in CAUGHT:
                continue
            if len(re.findall(r"\w+", text)) > 2:  # or else it only puts a place before another's
                place = f"{file.relative_to(ROOT)}:{node.lineno}"
                found.append((place, kind, " ".join(text.split())))
    return found


def troubleshooting() -> str:
    return (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def test_every_error_has_its_section() -> None:
    sections = set(re.findall(r"^## (\w+)$", troubleshooting(), re.M))
    ours = {kind for kind, value in vars(errors).items() if isinstance(value, type)}
    assert ours - {"LorainitError"} <= sections


def is_quoted(text: str, quoted: list[str]) -> bool:
    return any(all(part.strip() in text for part in quote.split("…")) for quote in quoted)


def test_every_message_is_on_the_page() -> None:
    quoted = [q.lower() for q in re.findall(r"^\| `([^`]{9,})` \|", troubleshooting(), re.M)]
    found = messages()
    assert len(found) > 100
    assert not is_quoted("an error that nobody wrote", quoted)
    missing = [
        f"{place} {kind}: {text}" for place, kind, text in found if not is_quoted(text, quoted)
    ]
    assert not missing, "not in docs/troubleshooting.md:\n" + "\n".join(missing)


def test_quoted_messages_are_the_programs_own() -> None:
    page = troubleshooting()
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


def test_every_option_of_peft_has_its_line() -> None:
    """All schemes that the installed PEFT offers, and every field of their configurations."""
    page = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    hints = typing.get_type_hints(peft.LoraConfig)
    literal = next(
        kind for kind in typing.get_args(hints["init_lora_weights"])
        if typing.get_origin(kind) is typing.Literal
    )  # fmt: skip
    schemes = typing.get_args(literal)
    assert "pissa" in schemes
    missing = [name for name in schemes if f'"{name}"' not in page]
    for kind in (EvaConfig, CordaConfig, LoraGAConfig):
        fields = dataclasses.fields(kind)
        missing += [
            f.name for f in fields if not re.search(rf"{kind.__name__}\([^`]*\b{f.name}=", page)
        ]
    assert not missing


def test_every_method_has_a_page() -> None:
    import lorainit

    pages = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "methods").glob("*"))
    for method in lorainit.METHODS.values():
        assert f"::: {method.__module__}.{method.__name__}\n" in pages
