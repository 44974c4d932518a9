"""Bad input of every kind is one line, and comes before the work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorainit.cli import commands, main


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: " in line
    return line


def code_of(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as done:
        return int(done.code or 0)


def init(place: Path, tmp_path: Path, *more: str) -> int:
    model = ["init", "--model", str(place / "model"), "--quiet", "--output", str(tmp_path / "a")]
    return code_of([*model, "--rank", "2", *more])


@pytest.mark.parametrize(
    "words",
    [
        "--alpha nan", "--alpha inf", "--alpha 0", "--alpha -1", "--dropout nan", "--dropout 1",
        "--dropout -0.1", "--rank 0", "--rank 1.5", "--seed 1e3", f"--max-sequences {10**400}",
        f"--seed {10**30}", "--batch-size 0", "--max-length nan",
    ],
)  # fmt: skip
def test_numbers_are_numbers(
    words: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(place, tmp_path, "--method", "pissa", *words.split()) == 2
    assert f"argument {words.split()[0]}: must be" in one_line(capsys)
    assert not (tmp_path / "a").exists()


def test_usual_numbers_are_taken(place: Path, tmp_path: Path) -> None:
    assert init(place, tmp_path, "--method", "pissa", "--alpha", "0.5", "--dropout", "0.1") == 0
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.1


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", float("nan")), ("alpha", 0), ("dropout", 2.0), ("rank", 0)]
)
def test_numbers_are_checked_from_python_too(name: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--{name} must be"):
        commands.init(model="m", output=str(tmp_path), method="pissa", **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "setting", "said"),
    [
        ("eva", "rho=[1]", "rho must be a value of type float"),
        ("eva", "rho=true", "rho must be a value of type float"),
        ("eva", "centered=3", "centered must be a value of type bool"),
        ("natural", "damping=x", "damping must be a value of type float"),
        ("natural", "steps=2.5", "steps must be a value of type int"),
        ("natural", f"steps={10**400}", "steps must be a whole number"),
        ("natural", "damping=1e999", "damping must be a finite number"),
        ("lora-ga", "scale=3", "scale must be a value of type str"),
        ("natural", "damping=" + "[" * 20000, "damping must be a value of type float"),
    ],
)
def test_settings_of_a_method_have_their_types(
    method: str,
    setting: str,
    said: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert init(place, tmp_path, "--method", method, "--set", setting) == 1
    assert said in one_line(capsys)


@pytest.mark.parametrize("pattern", ["*", "(q_proj", "q_proj|[", "(?P<n>a)(?P<n>b)"])
def test_a_broken_pattern(
    pattern: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(place, tmp_path, "--method", "pissa", "--target-modules", pattern) == 1
    assert "is no regular expression" in one_line(capsys)


def record(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (record('{"text": ' + "[" * 100000), "line 1, is nested too deeply"),
        (record('{"text": "a"}\n{"text": "a\\ud800b"}'), "line 2, holds a lone surrogate"),
        (record('{"text": ' + "9" * 5000 + "}"), "line 1, is no JSON"),
        (record('\n{"text": "a"'), "line 2, is no JSON"),
        (lambda path: path.write_bytes(b'\xff\xfe{\x00"\x00'), "is no UTF-8 text"),
    ],
)
def test_records_that_are_none(
    write: Callable[[Path], None],
    said: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "d.jsonl")
    data = str(tmp_path / "d.jsonl")
    assert init(place, tmp_path, "--method", "eva", "--data", data) == 1
    assert said in one_line(capsys)
    assert not (tmp_path / "a").exists()


def test_a_byte_order_mark_is_no_part_of_the_text(place: Path, tmp_path: Path) -> None:
    text = (place / "pairs.jsonl").read_text(encoding="utf-8")
    (tmp_path / "d.jsonl").write_text(text, encoding="utf-8-sig")
    (tmp_path / "c.yaml").write_text(f"data: {tmp_path / 'd.jsonl'}\nmethod: eva\n", "utf-8-sig")
    assert init(place, tmp_path, "--config", str(tmp_path / "c.yaml"), "--max-sequences", "4") == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [" * 5000, "is no YAML"),
        ("rank: {a: {b: 1}}", "is nested too deeply"),
        ("rank: [[1]]", "is nested too deeply"),
        ("when: 2026-99-99", "is no YAML"),
        ("? [a]\n: 1", "is no YAML"),
        ("!!python/object:os.system {}", "is no YAML"),
        ("- rank", "must hold a table of options"),
        ("rank: !!float x", "is no YAML"),
    ],
)
def test_options_in_a_file_that_are_none(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert code_of(["init", "--config", str(tmp_path / "c.yaml"), "--output", "o"]) == 1
    assert said in one_line(capsys)


@pytest.mark.parametrize("option", ["--data", "--output", "--statistics", "--model"])
@pytest.mark.parametrize("name", ["/tmp/" + "n" * 300, "./a\0b"])
def test_names_that_no_file_can_have(
    option: str, name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(place, tmp_path, "--method", "eva", "--max-sequences", "2", option, name) == 1
    one_line(capsys)


def test_a_closed_pipe_at_the_end_does_not_undo_the_work(place: Path, tmp_path: Path) -> None:
    words = ["init", "--model", str(place / "model"), "--output", str(tmp_path / "a")]
    code = (
        "import os, sys\nfrom lorainit.cli import main\n"
        "read, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, *words, "--method", "pissa", "--rank", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "a" / "adapter_config.json").is_file()
