"""Mistakes in paths, names and options are told before torch, PEFT or transformers is imported."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from lorainit.errors import DataError
from lorainit.models.place import check_place
from tests.cli.test_hard_inputs import one_line

MISTAKES = {
    "init --model @nowhere --data @d.jsonl --output @o": "no model folder",
    "init --model nowhere --data @d.jsonl --output @o": "OWNER/NAME",
    "init --model @ --data @d.jsonl --output @o": "holds no config.json",
    "init --model @deep --data @d.jsonl --output @o": "layers",
    "init --model @m --data @no.jsonl --output @o": "no data file",
    "init --model @m --data ./no/where --output @o": "no data file",
    "init --model @m --data @d.jsonl --output @m": "model's own folder",
    "init --model @m --data @d.jsonl --output @d.jsonl": "is a file",
    "init --model @m --statistics @s --output @o": "no statistics file",
    "init --model @m --reference @r --output @o": "no folder and no file",
    "init --model @m --statistics @d.jsonl --learning-rate 1e-4 --output @o": "give --data too",
    "collect --model @m --data @d.jsonl --output @d.jsonl": "holds something else",
    "train --model @m --data @d.jsonl --output @o": "--adapter",
    "train --model @m --data @d.jsonl --output @o --adapter @a": "adapter_config.json",
    "train --model @m --data @no.jsonl --output @o --adapter @cut": "no data file",
    "train --model @m --data @d.jsonl --output @o --adapter @cut": "adapter_model.safetensors",
    "compare --model @m --data @no.jsonl": "no data file",
    "compare --model @m --data @d.jsonl --output @d.jsonl": "holds something else",
    "report --model @m --statistics @s": "no statistics file",
    "report --model @m": "give --adapter, which 'lorainit init' writes",
    "report --model @m --data @no.jsonl": "no data file",
    "report --model @m --adapter @cut": "adapter_model.safetensors",
    "report --model @m --adapter @cut --reference @m": "Give --data",
    "report --model @m --statistics @d.jsonl --data @d.jsonl": "give --adapter",
    "report --model @m --statistics @d.jsonl --curves a=@c --output @r.html": "nothing at",
    "export --model @m --adapter @a --output @o": "adapter_config.json",
    "init --model @m --output @o --config @no.yaml": "Give a YAML file",
}

PROGRAM = """
import contextlib, io, json, sys
from lorainit.cli import main

def heavy():
    return sorted({"torch", "transformers", "peft"} & set(sys.modules))

found = {}
for line, words in json.load(sys.stdin).items():
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(words)
    found[line] = code, said.getvalue(), heavy()
# The control: what needs the methods' classes imports torch, and a name of a method no more than that.
with contextlib.redirect_stderr(io.StringIO()) as said:
    code = main(["collect", "--model", sys.argv[1], "--data", sys.argv[2], "--method", "no", "--output", "o"])
found["method"] = code, said.getvalue(), heavy()
print(json.dumps(found))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("m", "deep", "cut"):
        (tmp_path / name).mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "deep" / "config.json").write_text('{"num_hidden_layers": 100000000}')
    (tmp_path / "cut" / "adapter_config.json").write_text("{}")
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def test_mistakes_are_told_before_anything_heavy_is_imported(folder: Path) -> None:
    pytest.importorskip("trl")
    lines = {line: shlex.split(line.replace("@", f"{folder}/")) for line in MISTAKES}
    command = [sys.executable, "-c", PROGRAM, str(folder / "m"), str(folder / "d.jsonl")]
    done = subprocess.run(
        command, input=json.dumps(lines), capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    control = found.pop("method")
    for line, (code, said, imported) in found.items():
        assert MISTAKES[line] in said, line
        assert (code, said.count("\n"), imported) == (1, 1, []), line
    code, said, imported = control
    assert (code, imported) == (1, ["torch"])
    assert "there is no method 'no'" in said
    assert sorted(p.name for p in folder.iterdir()) == ["cut", "d.jsonl", "deep", "m"]


def test_a_missing_extra_is_told_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorainit.cli import main

    monkeypatch.setitem(sys.modules, "datasets", None)
    words = f"train --model {folder}/m --data {folder}/d.jsonl --method eva --output {folder}/o"
    assert main(words.split()) == 3
    assert "'lorainit train' needs datasets" in one_line(capsys)


# --- names on the hub -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["nowhere", "./no/where", "~/no", "a/b/c", "/no/where", "../no", ""]
)
def test_what_is_no_name_on_the_hub_is_not_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", asked := Asked(None))
    with pytest.raises(DataError, match="there is no model folder"):
        check_place(name)
    assert asked.urls == []


class Asked:
    """The hub, which raises what it is told to."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.urls = error, []

    def __call__(self, url: str, **_: object) -> None:
        self.urls.append(url)
        if self.error is not None:
            raise self.error


def answered(status: int) -> HfHubHTTPError:
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, f"{status} said the hub\nand more")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (None, True),
        (ConnectionError("no such host\n(details)"), False),
        (answered(404), False),
        (answered(401), False),
        (answered(503), True),
        (answered(429), True),
    ],
    ids=["there", "no network", "no such model", "not allowed", "down for now", "busy"],
)
def test_a_name_on_the_hub_is_asked_for_once(
    error: Exception | None, passes: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What may pass by waiting is left to transformers and its retries."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", asked := Asked(error))
    if passes:
        check_place("owner/name")
    else:
        with pytest.raises(DataError, match="HF_HUB_OFFLINE=1") as caught:
            check_place("owner/name")
        said = str(caught.value)
        assert "\n" not in said
        assert "in the cache (" in said
        assert str(error).splitlines()[0] in said
    assert len(asked.urls) == 1
    # What the cache holds is not asked for.
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "config.json")
    check_place("owner/name")
    assert len(asked.urls) == 1
