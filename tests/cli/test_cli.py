from __future__ import annotations

import dataclasses
import inspect
import json
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import ViTConfig

import lorainit
from lorainit.cli import main
from lorainit.cli.commands import COMMANDS as COMMANDS_BY_NAME
from lorainit.cli.parser import SHELL_ONLY, arguments_of, build_parser, with_file
from lorainit.report import read_curves
from tests.adapters import tiny
from tests.life.words import tokenizer

COMMANDS = ("methods", "collect", "init", "train", "compare", "report", "export")


def run(place: Path, line: str) -> int:
    words = [w.replace("@", str(place) + "/") for w in shlex.split(line)]
    return main(words)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom lorainit.cli import main\n"
        "try:\n    main(['init', '--help'])\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "assert 'torch' not in sys.modules and 'peft' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "example:" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_example_of_every_command_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    examples = shown[shown.index("example:") :].replace("\\\n", " ").splitlines()
    lines = [line for line in examples if line.strip().startswith("lorainit ")]
    assert lines
    for line in lines:
        parsed = build_parser().parse_args(shlex.split(line)[1:])
        assert parsed.command == command


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out.strip() == f"lorainit {lorainit.__version__}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "x", "--outptu", "y"], "no option --outptu (did you mean --output?)"),
        (["--modle=x", "--output", "y"], "no option --modle (did you mean --model?)"),
        (["--xyz", "1"], "no option --xyz."),
        (["--model", "x"], "arguments are required: --output"),
        # Options may be cut short.
        (["--mod", "x"], "arguments are required: --output"),
    ],
)
def test_a_mistyped_option_is_named_before_the_one_that_it_leaves_missing(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["init", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_methods_say_what_the_model_computes_at_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert list(table) == list(lorainit.METHODS)
    assert table["lora-da"]["start"] == "displaced"
    assert table["pissa"]["start"] == "kept (anchored)"
    assert table["eva"]["start"] == "kept (B = 0)"
    assert table["orthogonal"]["start"] == "kept (B A = 0)"


def test_the_table_of_methods_doubts_nothing(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["methods"]) == 0
    assert not caplog.records
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("data", ["pairs", "chats"])
def test_init_writes_an_adapter_that_peft_loads(place: Path, data: str, tmp_path: Path) -> None:
    line = (
        f"init --model @model --data @{data}.jsonl --method lora-da --rank 4 --rslora --quiet "
        f"--output {tmp_path}/a"
    )
    assert run(place, line) == 0
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "a")
    factors = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert factors
    assert all(bool(p.any()) for p in factors)
    assert model.peft_config["default"].use_rslora


def test_init_by_default_is_auto(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model has random weights: no step takes a quarter of its loss away, so plain LoRA it is."""
    line = "init --model @model --data @pairs.jsonl --rank 4 --output"
    assert run(place, f"{line} {tmp_path}/a") == 0
    assert "plain LoRA, the measured start takes" in capsys.readouterr().out
    assert run(place, f"{line} {tmp_path}/b --set least_gain=0") == 0
    plain, natural = (
        PeftModel.from_pretrained(tiny.llama(), tmp_path / name) for name in ("a", "b")
    )
    for model, moved in ((plain, False), (natural, True)):
        factors = [p for n, p in model.named_parameters() if "lora_B" in n]
        assert any(bool(p.any()) for p in factors) is moved
    assert "Auto" in (tmp_path / "a" / "lorainit.json").read_text()


def test_compare_measures_lengths_on_sequences_held_back(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What measures a length gets the data alone, everything else the shared statistics alone."""
    from lorainit.cli import comparing

    seen = {}
    started = comparing.get_peft_model

    def watched(*arguments: object, **named: object) -> object:
        seen[type(named["method"]).__name__] = named["statistics"], named["data"]
        return started(*arguments, **named)

    monkeypatch.setattr(comparing, "get_peft_model", watched)
    line = "compare --model @model --data @pairs.jsonl --methods lora-da,natural --steps 1 --rank 2"
    assert run(place, f"{line} --learning-rates 1e-3 --held-out 4 --batch-size 2 --quiet") == 0
    assert seen["LoraDA"][0] is not None
    assert seen["LoraDA"][1] is None
    assert seen["Natural"][0] is None
    assert seen["Natural"][1] is not None


def test_shell_and_python_agree(place: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from lorainit.data import load_batches

    line = "init --model @model --data @pairs.jsonl --method lora-da --rank 4 --quiet"
    assert run(place, f"{line} --output {tmp_path}/a") == 0
    data = load_batches(place / "pairs.jsonl", AutoTokenizer.from_pretrained(place / "model"))
    config = tiny.config(lora_alpha=4)
    here = lorainit.get_peft_model(
        tiny.llama(), config, method=lorainit.LoraDA(), data=data, progress=False
    )
    there = PeftModel.from_pretrained(tiny.llama(), tmp_path / "a")
    torch.testing.assert_close(tiny.logits(here), tiny.logits(there), rtol=1e-5, atol=1e-6)


def test_statistics_serve_other_methods_and_ranks(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.safetensors"
    assert run(place, f"collect --model @model --data @pairs.jsonl --output {file} --json") == 0
    assert json.loads(capsys.readouterr().out)["sequences"] == 32
    for method, rank in (("lora-one", 2), ("eva", 8)):
        line = (
            f"init --model @model --statistics {file} --method {method} --rank {rank} "
            f"--output {tmp_path}/{method} --json"
        )
        assert run(place, line) == 0
        assert json.loads(capsys.readouterr().out)["rank"] == rank


@pytest.mark.parametrize("method", ["loftq", "qera", "kronecker-qer --set rho=2"])
def test_a_quantized_model_is_brought_nearer_to_its_reference(
    method: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tiny.llama()
    coarse = tiny.llama()
    with torch.no_grad():
        for name, parameter in coarse.named_parameters():
            if "proj" in name:
                parameter.copy_((parameter * 50).round() / 50)
    coarse.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    options = "--rank 8 --alpha 16 --output @start --model @model --reference"
    shared = f"init {options} {place / 'model'} --data {place / 'pairs.jsonl'} --method {method}"
    assert run(tmp_path, shared) == 0
    wanted, far = tiny.logits(full), tiny.logits(coarse)
    started = PeftModel.from_pretrained(coarse, tmp_path / "start")
    assert bool(started.peft_config["default"].rank_pattern) == ("rho" in method)
    assert (tiny.logits(started) - wanted).norm() < 0.9 * (far - wanted).norm()
    # The command that is printed shows what quantization took.
    said = capsys.readouterr().out
    (command,) = [line for line in said.splitlines() if line.startswith("or look at it first: ")]
    words = shlex.split(command.partition(": lorainit ")[2])
    page = tmp_path / "page.html"
    assert main([*words, "--quiet", "--output", str(page)]) == 0
    assert "What quantization took" in page.read_text(encoding="utf-8")


def test_export_and_anchor(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, served = tmp_path / "start", tmp_path / "served"
    assert run(place, f"init --model @model --method pissa --rank 4 --output {start} --json") == 0
    assert json.loads(capsys.readouterr().out)["saved_rank"] == 8
    assert run(place, f"export --model @model --adapter {start} --output {served} --json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rank"] == 8
    assert shown["objections"] == []


def test_dry_run_plans_and_writes_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (
        f"init --model @model --data @pairs.jsonl --method natural --set steps=2 --rank 4 "
        f"--output {tmp_path}/none --dry-run --json"
    )
    assert run(place, line) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["layers"] == 14
    assert shown["passes"] == 2
    assert shown["sequences"] == 32
    stats = lorainit.collect_statistics(
        tiny.llama(),
        tiny.config(),
        data=[tiny.batch()],
        needs=lorainit.Natural.needs,
        progress=False,
    )
    assert 0.3 < stats.nbytes / shown["statistics_bytes_at_most"] <= 1
    assert not (tmp_path / "none").exists()


def test_train_and_compare(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    line = (
        f"train --model @model --data @chats.jsonl --method eva --rank 4 --max-steps 12 "
        f"--learning-rate 1e-2 --logging-steps 1 --output {tmp_path}/t --json"
    )
    assert run(place, line) == 0
    losses = json.loads(capsys.readouterr().out)["losses"]
    assert losses[-1] < losses[0]
    assert (tmp_path / "t" / "adapter_model.safetensors").is_file()
    (curve,) = read_curves(tmp_path / "t")
    assert [loss for _, loss in curve.points] == losses


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--max-steps 3", [1, 2, 3]),
        ("--max-steps 3 --logging-steps 2", [1, 2, 3]),
        ("--max-steps 7 --logging-steps 5", [1, 5, 7]),
        ("--max-steps 41 --batch-size 1", [1, *range(3, 42, 3), 41]),
    ],
)
def test_losses_of_the_first_and_the_last_step_are_recorded(
    words: str, wanted: list[int], place: Path, tmp_path: Path
) -> None:
    """And in a long run about twenty."""
    pytest.importorskip("trl")
    line = "train --model @model --data @pairs.jsonl --method vanilla --rank 2 --learning-rate 1e-3"
    assert run(place, f"{line} --max-length 16 --quiet --output {tmp_path}/t {words}") == 0
    (curve,) = read_curves(tmp_path / "t")
    assert [step for step, _ in curve.points] == wanted


def test_the_rate_of_the_start_is_what_it_is_trained_at(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    init = f"init --model @model --data @chats.jsonl --method eva --rank 4 --output {tmp_path}/s --json"
    assert run(place, init) == 0
    suggested = json.loads(capsys.readouterr().out)["learning_rate"]
    assert 1e-6 < suggested < 1
    rest = f"--data @chats.jsonl --max-steps 2 --adapter {tmp_path}/s --json --model @model"
    assert run(place, f"train {rest} --output {tmp_path}/t") == 0
    assert json.loads(capsys.readouterr().out)["learning_rate"] == suggested
    # Control: a rate that is given is taken.
    assert run(place, f"train {rest} --output {tmp_path}/u --learning-rate 3e-3") == 0
    assert json.loads(capsys.readouterr().out)["learning_rate"] == 3e-3


def test_a_start_is_matched_to_a_rate_and_trained_at_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    init = f"init --model @model --data @chats.jsonl --method eva --rank 4 --output {tmp_path}/s"
    assert run(place, f"{init} --learning-rate 2e-5 --json") == 0
    shown = json.loads(capsys.readouterr().out)
    side = json.loads((tmp_path / "s" / "lorainit.json").read_text())
    config = json.loads((tmp_path / "s" / "adapter_config.json").read_text())
    assert shown["learning_rate"] == side["measured"]["learning_rate"] == 2e-5
    assert side["resized"] < 1
    assert shown["lora_alpha"] == config["lora_alpha"] == side["lora_alpha"]
    assert config["lora_alpha"] == pytest.approx(4 / side["resized"] ** 2)
    assert run(place, f"{init} --learning-rate 2e-5") == 0
    assert "matched to the learning rate 2e-05" in capsys.readouterr().out
    rest = f"--data @chats.jsonl --max-steps 2 --adapter {tmp_path}/s --json --model @model"
    assert run(place, f"train {rest} --output {tmp_path}/t") == 0
    assert json.loads(capsys.readouterr().out)["learning_rate"] == 2e-5
    assert run(place, f"{init} --learning-rate 2e-5 --dry-run --json") == 0


@pytest.mark.parametrize("data", ["pairs", "chats"])
def test_compare_tunes_every_method(
    place: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (
        f"compare --model @model --data @{data}.jsonl --methods vanilla,lora-one,filet --held-out 8 "
        f"--learning-rates 1e-5,1e-4 --steps 8 --rank 4 --output {tmp_path}/c.json"
    )
    assert run(place, line) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "c.json").read_text())
    for name, runs in result["runs"].items():
        # A larger rate is better here, so further ones are tried.
        suggested = result["suggested"][name]
        assert suggested in [run["rate"] for run in runs]
        assert f"{suggested:.2g}" in shown
        rates = [run["rate"] for run in runs]
        assert {1e-5, 1e-4} < set(rates)
        losses = [run["loss"] for run in runs]
        inside = min(losses) not in (losses[0], losses[-1])
        # By the factor of the grid outwards from the best, at most twice.
        assert inside or len(runs) == 5
        assert all(r == pytest.approx(10 * s, rel=0.05) for s, r in pairwise(rates[2:]))
        assert (name in shown.partition("outermost")[2].partition("Try")[0]) == (not inside)
        assert len({run["start_loss"] for run in runs}) == 1, "a run left something for the next"
        assert len({run["train_losses"][0] for run in runs}) == 1
        best = result["best"][name]
        assert best["loss"] == min(run["loss"] for run in runs) < best["start_loss"]
        assert best["curve"][0] == [0, best["start_loss"]]
        assert [step for step, _ in best["curve"]] == [0, 2, 4, 6, 8]
        assert f"{best['loss']:.4f}" in shown
    for kept in ("vanilla", "filet"):
        assert result["best"][kept]["start_loss"] == pytest.approx(result["base_loss"], rel=1e-6)
    assert result["best"]["lora-one"]["start_loss"] != pytest.approx(result["base_loss"], rel=1e-6)
    assert len(read_curves(tmp_path / "c.json")) == 6


def test_compare_is_the_same_for_one_method_alone(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever was trained before it on the same base model."""
    losses = []
    for methods in ("pissa,eva", "eva"):
        line = (
            f"compare --model @model --data @pairs.jsonl --methods {methods} --held-out 8 "
            "--learning-rates 1e-3 --steps 4 --rank 4 --dropout 0.1 --json"
        )
        assert run(place, line) == 0
        losses.append(json.loads(capsys.readouterr().out)["runs"]["eva"][0]["train_losses"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("command", ["collect", "init", "train --method natural", "compare"])
def test_every_long_command_has_a_plan(
    command: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    line = f"{command} --model @model --data @pairs.jsonl --output {tmp_path}/o --dry-run"
    assert run(place, line) == 0
    shown = capsys.readouterr().out
    for word in ("layers", "memory", "passes", "time"):
        assert f"\n{word} " in f"\n{shown}"
    assert ("training" in shown) == (command.split()[0] in ("train", "compare"))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_added_up_as_the_shell_says(dtype: str, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    line = f"collect --model @model --data @pairs.jsonl --method lora-ga --output {out}"
    assert run(place, f"{line} --gradient-dtype {dtype}") == 0
    found = lorainit.Statistics.load(out)
    assert found.metadata["gradient_dtype"] == dtype
    assert {str(layer.gradient_sum.dtype) for _, layer in found.items()} == {f"torch.{dtype}"}


def test_report_from_the_shell(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, start, page = (tmp_path / n for n in ("s.safetensors", "start", "page.html"))
    assert run(place, f"collect --model @model --data @pairs.jsonl --output {file} --quiet") == 0
    line = f"--model @model --statistics {file} --rank 4 --quiet"
    assert run(place, f"init {line} --method filet --output {start}") == 0
    capsys.readouterr()
    line = f"report --model @model --statistics {file} --adapter {start} --rank 4 --output {page}"
    assert run(place, f"{line} --json") == 0
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert advice
    # The side file names what it was started from.
    assert run(place, f"{line.replace(f'--statistics {file} ', '')} --json") == 0
    assert json.loads(capsys.readouterr().out)["advice"] == advice
    text = page.read_text(encoding="utf-8")
    assert "It is anchored" in text
    assert "Measured on" not in text
    # With data the losses are measured, whatever the method; an anchored start has the base's.
    assert run(place, f"{line} --data @pairs.jsonl --max-sequences 16 --json") == 0
    said = json.loads(capsys.readouterr().out)["advice"]
    assert any("starts at the base model's loss" in entry["text"] for entry in said)
    assert "Measured on 16 records of pairs.jsonl" in page.read_text(encoding="utf-8")


def test_report_takes_statistics_of_the_records_that_the_start_was_made_from(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "mine.jsonl"
    shutil.copy(place / "pairs.jsonl", records)
    started = f"init --model @model --data {records} --method natural --rank 4 --quiet"
    assert run(place, f"{started} --output {tmp_path / 'start'}") == 0
    measured = json.loads((tmp_path / "start" / "lorainit.json").read_text())["measured"]
    line = f"report --model @model --adapter {tmp_path / 'start'} --quiet --json"

    def page(words: str) -> tuple[str, list[str]]:
        file = tmp_path / "page.html"
        capsys.readouterr()
        assert run(place, f"{line} {words} --output {file}") == 0
        said = json.loads(capsys.readouterr().out)["advice"]
        return file.read_text(encoding="utf-8"), [entry["text"] for entry in said]

    # The same numbers as from a file of statistics, bit for bit.
    file = tmp_path / "s.safetensors"
    assert run(place, f"collect --model @model --data {records} --output {file} --quiet") == 0
    alone = page("")
    assert alone == page(f"--statistics {file}")
    assert "What rank 4 keeps" in alone[0]
    assert f"<td>{measured['start_loss']:.4f}</td>" in alone[0]
    # The very records: the loss is that of those held back, not of those that the start has seen.
    assert page(f"--data {records}") == alone
    other = page("--data @chats.jsonl --max-sequences 16")
    assert "Measured on 16 records of chats.jsonl" in other[0]
    assert other != alone
    # Without them there is what the record says.
    records.unlink()
    bare = page("")
    assert "What rank 4 keeps" not in bare[0]
    assert "Spectra" not in bare[0]
    assert f"<td>{measured['start_loss']:.4f}</td>" in bare[0]
    assert "How far the adapter goes" in bare[0]
    assert bare[1][0] == alone[1][0]  # the rate
    assert "--data FILE" in bare[1][1]


def test_report_of_data_alone(place: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run(place, f"report --model @model --data @pairs.jsonl --rank 4 --output {page}") == 0
    assert "What rank 4 keeps" in page.read_text(encoding="utf-8")


def test_train_names_the_extra(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    assert run(place, "train --model @model --data @pairs.jsonl --method eva --output x") == 3
    assert "pip install 'lorainit[train]'" in capsys.readouterr().err


WRONG = {
    "init --model @model --method loftq --output @x": "give --reference",
    "init --model @model --method loftq --reference @nothing --output @x": "is no folder and no file",
    "report --model @model --statistics @x --reference @nothing --output @x": "is no folder and no file",
    "init --model @model --method loftq --reference @model --output @x": "nothing to give back",
    "init --model @model --method pissa --reference @model --output @x": "reads no reference_weights",
    "init --model @nothing --method pissa --output @x": "no model folder",
    "init --model @model --output @x": "give --data",
    "init --model @model --method nothing --output @x": "there is no method",
    "init --model @model --data @nothing --output @x": "no data file",
    "init --model @model --data @pairs.jsonl --method lora-da --set gama=1 --output @x": "has no setting",
    "init --model @model --data @pairs.jsonl --method lora-da --set gamma=0 --output @x": "gamma must be",
    "init --model @model --data @pairs.jsonl --target-modules none --output @x": "all-linear",
    "init --model @model --statistics @nothing --output @x": "no statistics file",
    "init --model @model --data @pairs.jsonl --max-memory 1 --output @x": "is too small",
    "init --model @model --data @pairs.jsonl --max-memory much --output @x": "like '24GiB'",
    "init --model @model --method pissa --device nowhere --output @x": "--device nowhere",
    "init --model @model --method pissa --output @pairs.jsonl/x": "cannot be written",
    "collect --model @model --data @pairs.jsonl --method pissa --output @x": "nothing to do",
    "compare --model @model --data @pairs.jsonl --held-out 32": "too few",
    "train --model @model --data @pairs.jsonl --output @x": "--adapter",
    "init --model @mute --data @pairs.jsonl --output @x": "save_pretrained(FOLDER)",
    "init --model @cut --method pissa --output @x": "cut off",
    "init --model @sees --method pissa --output @x": "no causal language model",
    "init --model @sees --method pissa --output @x --dry-run": "no causal language model",
    "init --model @model --data @broken.jsonl --output @x": "line 2, is no JSON",
    "init --model @model --data @empty.jsonl --output @x": "no records",
    "init --model @model --data @pairs.jsonl --max-length 1 --output @x": "every label is masked",
    "init --model @model --method pissa --output @pairs.jsonl": "is a file",
    "init --model @model --method pissa --output @others": "notes.txt",
    "init --model @model --method pissa --output /proc/x": "Give another place",
    "init --model @model --method pissa --output @x --config @nothing": "Give a YAML file",
    "train --model @model --data @pairs.jsonl --method eva --output @others": "notes.txt",
    "collect --model @model --data @pairs.jsonl --output @others": "it is a folder",
    "export --model @model --adapter @nothing --output @others": "notes.txt",
    "export --model @model --adapter @nothing --output @x": "adapter_config.json",
}


@pytest.fixture(scope="session")
def bad(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good place, and beside it a model without tokenizer, a cut-off file, another kind of model."""
    folder = tmp_path_factory.mktemp("bad") / "place"
    shutil.copytree(place, folder)
    shutil.copytree(place / "model", folder / "mute", ignore=shutil.ignore_patterns("token*"))
    shutil.copytree(place / "model", folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ViTConfig().save_pretrained(folder / "sees")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": "b\n')
    (folder / "empty.jsonl").write_text("\n")
    (folder / "others").mkdir()
    (folder / "others" / "notes.txt").write_text("mine")
    return folder


@pytest.mark.parametrize("line", WRONG)
def test_bad_input_is_one_line_with_the_remedy(
    line: str, bad: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in bad.rglob("*")}
    assert run(bad, line) == 1
    assert {file: file.stat().st_mtime_ns for file in bad.rglob("*") if file != bad} == before
    shown = capsys.readouterr()
    assert shown.out == ""
    said = [text for text in shown.err.splitlines() if "error:" in text]
    assert len(said) == 1
    assert WRONG[line] in said[0]


@pytest.mark.parametrize(
    "line",
    [
        "init",
        "nothing",
        "init --model m --output o --rank 0",
        "compare --model m --data d --learning-rates a",
        "init --model m --output o --set gamma",
    ],
)
def test_wrong_usage_is_two(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(shlex.split(line))
    assert done.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "error:" in said
    assert said.endswith("--help'.")


def test_an_adapter_is_written_over_its_like_alone(place: Path, tmp_path: Path) -> None:
    line = f"init --model @model --method pissa --rank 4 --quiet --output {tmp_path / 'o'}"
    assert run(place, line) == 0
    assert run(place, line) == 0


@pytest.mark.slow
def test_interrupted_collection_leaves_nothing(place: Path, tmp_path: Path) -> None:
    """A signal in the middle of the pass: one line, exit code 130, no file."""
    code = (
        "import os, signal, sys\n"
        "from lorainit.cli import main\n"
        "import lorainit.data.loading as data\n"
        # Whoever runs the tests in the background may have the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "whole, seen = data.collate, []\n"
        "def collate(examples, pad):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return whole(examples, pad)\n"
        "data.collate = collate\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "s.safetensors"
    words = ["collect", "--model", place / "model", "--data", place / "pairs.jsonl"]
    words += ["--output", out, "--batch-size", "2", "--quiet"]
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "lorainit: interrupted; nothing half-written is left\n"
    assert list(tmp_path.iterdir()) == []


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("lorainit.cli.listing.run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["methods"])


def test_options_from_yaml_give_way_to_those_of_the_shell(tmp_path: Path) -> None:
    file = tmp_path / "start.yaml"
    file.write_text(
        "model: m\noutput: o\nrank: 8\nrslora: true\nset:\n  gamma: 32\ntarget_modules: [q, v]\n"
    )
    words = with_file(["init", "--config", str(file), "--rank", "4", "--set", "beta=2"])
    options = build_parser().parse_args(words)
    assert (options.model, options.rank, options.rslora) == ("m", 4, True)
    assert options.set == {"gamma": "32", "beta": "2"}
    assert options.target_modules == "q,v"


def test_a_file_with_an_unknown_option_names_those_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "start.yaml"
    file.write_text("model: m\nrnak: 8\n")
    assert main(["init", "--config", str(file), "--output", "o"]) == 1
    said = capsys.readouterr().err
    assert "'lorainit init' has no option 'rnak'" in said
    assert "target_modules" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_shell_file_and_python_have_one_signature(command: str, tmp_path: Path) -> None:
    """The shell, YAML and a call take the same names, and give the function the same values."""
    function = COMMANDS_BY_NAME[command]
    parameters = inspect.signature(function).parameters
    options = build_parser()._subparsers._group_actions[0].choices[command]._actions
    flags = {flag for action in options for flag in action.option_strings}
    shell = {flag.removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")}
    assert shell - set(SHELL_ONLY) - {"help"} == set(parameters)
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())

    required = [name for name, p in parameters.items() if p.default is p.empty]
    words = [word for name in required for word in (f"--{name.replace('_', '-')}", "x")]
    parsed = arguments_of(build_parser().parse_args([command, *words]))
    bound = inspect.signature(function).bind(**dict.fromkeys(required, "x"))
    bound.apply_defaults()
    assert parsed == bound.arguments

    file = tmp_path / "options.yaml"
    file.write_text("".join(f"{name}: x\n" for name in required))
    read = build_parser().parse_args(with_file([command, "--config", str(file)]))
    assert arguments_of(read) == parsed


@pytest.mark.parametrize("command", ["collect", "init", "train", "compare"])
def test_options_are_those_of_the_functions_behind(command: str) -> None:
    """What a command shares with `collect_statistics` and `get_peft_model` means the same there."""
    ours = inspect.signature(COMMANDS_BY_NAME[command]).parameters
    theirs = inspect.signature(lorainit.get_peft_model).parameters
    settings = {f.name: f.default for f in dataclasses.fields(lorainit.CollectSettings)}
    shared = {"token_mask", "loss_reduction", "max_sequences", "max_memory"}
    assert shared <= set(ours) & set(settings)
    for name in {"cap_rank"} & set(ours):
        assert ours[name].default == theirs[name].default
    for name in shared:
        assert ours[name].default == settings[name]


def test_every_option_goes_through_a_file_and_the_shell_alike(tmp_path: Path) -> None:
    from lorainit.cli import commands

    given = {
        "model": "m", "output": "o", "data": "d.jsonl", "methods": ["eva", "pissa"],
        "learning_rates": [1e-4, 0.5], "steps": 3, "alpha": 2.5, "rslora": True,
        "target_modules": "q_proj,v_proj", "loss_reduction": "token", "seed": -1,
    }  # fmt: skip
    file = tmp_path / "compare.yaml"
    file.write_text(json.dumps(given))  # JSON is YAML
    read = arguments_of(build_parser().parse_args(with_file(["compare", "--config", str(file)])))
    defaults = {
        name: p.default for name, p in inspect.signature(commands.compare).parameters.items()
    }
    assert read == defaults | given


def test_commands_from_python(place: Path, tmp_path: Path) -> None:
    from lorainit.cli import commands

    outcome = commands.init(
        model=str(place / "model"),
        data=str(place / "pairs.jsonl"),
        method="eva",
        set={"rho": 1.5},
        target_modules=["q_proj", "v_proj"],
        rank=4,
        output=str(tmp_path / "start"),
        quiet=True,
    )
    assert outcome.values["layers"] == 4
    assert outcome.values["settings"]["rho"] == 1.5
    assert (tmp_path / "start" / "adapter_config.json").is_file()


def test_public_names_come_when_they_are_used() -> None:
    code = (
        "import lorainit, sys\nassert 'torch' not in sys.modules\n"
        "assert lorainit.LoraDA().gamma == 1024 and lorainit.methods.METHODS\n"
        "assert {'get_peft_model', 'Natural'} <= set(dir(lorainit))\n"
        "from lorainit import *\nStatistics, Natural, export, collect_statistics\n"
        "try:\n    lorainit.nothing\nexcept AttributeError:\n    print('good')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "good", done.stderr
