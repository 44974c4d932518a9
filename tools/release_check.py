"""What a user would get: build, look inside, install in a clean environment, and try it there.

    python tools/release_check.py             the wheel, required dependencies alone, pinned
    python tools/release_check.py --oldest    ... at the lower bounds of pyproject.toml
    python tools/release_check.py --newest    ... at the newest releases
    python tools/release_check.py --python P  ... into the environment of interpreter P, as it is

Needs nothing but Python and a package index. Prints a table; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import traceback
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = re.search(r'"(.+)"', (ROOT / "src/lorainit/_version.py").read_text())[1]  # type: ignore[index]


@dataclass
class Table:
    """Checks, one after the other; a failure does not keep the next from running."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    failed: bool = False

    def check(self, name: str, work: Callable[[], str]) -> None:
        begin = time.perf_counter()
        try:
            found = work()
        except Exception as error:
            self.failed = True
            found = f"FAILED: {error}"
            if not isinstance(error, AssertionError | subprocess.CalledProcessError):
                traceback.print_exc()
        self.rows.append((name, f"{time.perf_counter() - begin:.0f} s", found))
        print(f"{name}: {found}", flush=True)

    def show(self) -> None:
        wide = max(len(name) for name, _, _ in self.rows)
        print()
        for name, seconds, found in self.rows:
            print(f"{name:<{wide}}  {seconds:>6}  {found.splitlines()[0]}")


def run(*words: object, cwd: Path | None = None, code: int = 0) -> str:
    """Standard output of a command that ends with this exit code."""
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False
    )
    said = (done.stdout + done.stderr).strip()
    assert done.returncode == code, f"{words} ended with {done.returncode}:\n{said[-3000:]}"
    return done.stdout


def environment(folder: Path, *packages: str) -> Path:
    """The interpreter of a new virtual environment with these packages."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    if packages:
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
    return python


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    python = environment(folder / "builder", "build")
    run(python, "-m", "build", "--outdir", folder / "dist", ROOT)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


def look_into_sdist(sdist: Path) -> str:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "SUPPORT.md", "SECURITY.md",
        "pyproject.toml", "mkdocs.yml",
        "src/lorainit/py.typed", "tests/conftest.py", "tests/cli/test_cli.py", "docs/index.md",
        "examples/sft.py", "requirements/constraints.txt", "Makefile",
    ):  # fmt: skip
        assert needed in names, f"the sdist lacks {needed}"
    assert not [n for n in names if "__pycache__" in n or n.startswith((".cache", "outputs"))]
    return f"{sdist.name}, {len(names)} files, {sdist.stat().st_size / 1e6:.1f} MB"


def look_into_wheel(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"lorainit-{VERSION}.dist-info/METADATA").decode()
        entries = archive.read(f"lorainit-{VERSION}.dist-info/entry_points.txt").decode()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"lorainit", f"lorainit-{VERSION}.dist-info"}, tops
    assert "lorainit/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names), "no licence"
    assert f"\nVersion: {VERSION}\n" in metadata
    required = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.M)
    assert sorted(required) == sorted(PROJECT["dependencies"]), required
    assert "lorainit = lorainit.cli:main" in entries
    return f"{wheel.name}, {len(names)} files, needs {', '.join(sorted(required))}"


def lowest() -> list[str]:
    """The required dependencies at their lower bounds."""
    return [text.replace(">=", "==") for text in PROJECT["dependencies"]]


def install(folder: Path, wheel: Path, versions: str) -> Path:
    """The wheel in an environment of its own, with nothing but what it requires."""
    if versions == "pinned":
        constraints = ROOT / "requirements" / "constraints.txt"
        return environment(folder, "--constraint", str(constraints), str(wheel))
    return environment(folder, str(wheel), *(lowest() if versions == "oldest" else []))


def versions_of(python: Path) -> str:
    names = ["torch", "transformers", "peft", "safetensors", "tqdm", "numpy"]
    code = f"from importlib.metadata import version as v\nprint(*(n + ' ' + v(n) for n in {names}))"
    return run(python, "-c", code).strip()


IMPORTS = """
import importlib, pkgutil, sys
import lorainit
assert "site-packages" in lorainit.__file__, lorainit.__file__
assert "torch" not in sys.modules
from lorainit.errors import MissingExtraError
names = [m.name for m in pkgutil.walk_packages(lorainit.__path__, "lorainit.")]
for name in names:
    if not name.endswith("__main__"):
        try:
            importlib.import_module(name)
        except MissingExtraError:
            # Of a tool that is not installed; it says so.
            assert name.startswith("lorainit.integrations."), name
for extra in ("trl", "datasets", "matplotlib", "pytest"):
    assert extra not in sys.modules, extra
print(len(names), "modules")
"""

MODEL = """
import json, sys
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
words = ["<pad>", "<eos>", *(f"w{i}" for i in range(60))]
backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=62, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
))
model.save_pretrained("model")
tokenizer.save_pretrained("model")
with open("train.jsonl", "w") as file:
    for i in range(64):
        record = {"prompt": f"w{i % 60} w{i % 7} ", "completion": f"w{i % 60} w{i % 5}"}
        file.write(json.dumps(record) + "\\n")
"""

README = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from lorainit.data import load_batches
from lorainit.models.pretrained import load_whole

model = load_whole(AutoModelForCausalLM, "model")
dataloader = load_batches("train.jsonl", AutoTokenizer.from_pretrained("model"))
{example}
ids = torch.arange(2, 12)[None]
torch.save((ids, model.eval()(ids).logits.detach()), "logits.pt")
"""

STOCK = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids, expected = torch.load("logits.pt")
base, found = AutoModelForCausalLM.from_pretrained("model", output_loading_info=True)
assert not any(found.values()), found
model = PeftModel.from_pretrained(base, "adapter").eval()
error = float((model(ids).logits - expected).abs().max())
assert error < 1e-4, error
assert "lorainit" not in sys.modules
print(f"stock PEFT computes the same logits to {error:.0e}")
"""


def first_example() -> str:
    """The first Python block of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"^```python\n(.*?)^```", text, re.M | re.S)[1]  # type: ignore[index]


def try_it(table: Table, python: Path, place: Path) -> None:
    """The command line, the README's example, and stock PEFT, in an empty folder."""
    tool = python.parent / "lorainit"
    place.mkdir()
    table.check("every module imports", lambda: run(python, "-c", IMPORTS, cwd=place).strip())
    table.check("lorainit --version", lambda: run(tool, "--version", cwd=place).strip())
    table.check("lorainit --help", lambda: run(tool, "--help", cwd=place).splitlines()[0])
    table.check(
        "lorainit methods", lambda: f"{len(run(tool, 'methods', cwd=place).splitlines())} lines"
    )
    run(python, "-c", MODEL, cwd=place)
    example = README.replace("{example}", first_example())
    table.check("README's first example", lambda: run(python, "-c", example, cwd=place) or "ran")
    table.check("... in stock PEFT", lambda: run(python, "-c", STOCK, cwd=place).strip())
    common = ["--model", "./model", "--rank", "4"]
    data = ["--data", "train.jsonl"]

    def shell(*words: str, code: int = 0) -> str:
        return run(tool, *words, cwd=place, code=code).strip().splitlines()[0]

    statistics = ["--statistics", "s.safetensors"]
    table.check(
        "lorainit collect",
        lambda: shell("collect", "--model", "./model", *data, "--output", statistics[1]),
    )
    for method in ("lora-da", "natural", "filet"):
        words = ["init", *common, *data, *statistics, "--method", method, "--output", method]
        table.check(f"lorainit init {method}", lambda words=words: shell(*words))  # type: ignore[misc]
    words = ["report", *common, *statistics, "--adapter", "natural", "--output", "r.html"]
    table.check("lorainit report", lambda: shell(*words))
    table.check(
        "lorainit export",
        lambda: shell("export", "--model", "./model", "--adapter", "filet", "--output", "e"),
    )
    missing = ["train", *common, *data, "--method", "eva", "--output", "t"]

    def refused() -> str:
        done = subprocess.run(
            [str(tool), *missing], cwd=place, capture_output=True, text=True, check=False
        )
        assert done.returncode == 3, done.stderr
        assert "pip install 'lorainit[train]'" in done.stderr
        return done.stderr.strip().splitlines()[-1]

    table.check("lorainit train names its extra", refused)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--oldest", action="store_true", help="lower bounds of pyproject.toml")
    which.add_argument("--newest", action="store_true", help="newest releases")
    which.add_argument(
        "--python", type=Path, help="an environment that is there, all but the wheel"
    )
    parser.add_argument("--keep", type=Path, help="folder to work in, and to leave behind")
    options = parser.parse_args()
    versions = "oldest" if options.oldest else "newest" if options.newest else "pinned"
    versions = "given" if options.python else versions
    table = Table()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        made: dict[str, Path] = {}

        def builds() -> str:
            made["sdist"], made["wheel"] = build(folder)
            return "sdist, and the wheel from it"

        def installs() -> str:
            if options.python:
                words = ("install", "--quiet", "--no-deps", "--force-reinstall", made["wheel"])
                run(options.python, "-m", "pip", *words)
                made["python"] = options.python.absolute()
            else:
                made["python"] = install(folder / versions, made["wheel"], versions)
            return versions_of(made["python"])

        table.check("build", builds)
        if "wheel" in made:
            table.check("sdist", lambda: look_into_sdist(made["sdist"]))
            table.check("wheel", lambda: look_into_wheel(made["wheel"]))
            table.check(f"install, {versions}", installs)
        if "python" in made:
            try_it(table, made["python"], folder / f"try-{versions}")
    table.show()
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
