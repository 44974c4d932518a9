"""`tools.peft_suite` tells apart what a failure of PEFT's tests comes from, on three tests made for that."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tools.peft_suite import __main__ as suite

from tests.fresh import run_forked

MADE = """
import torch
from peft import LoraConfig, PeftModel, get_peft_model


def made(**changes):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8))
    return layers, get_peft_model(layers, LoraConfig(r=2, target_modules=["0"], **changes))


def factors(model):
    return model.base_model.model[0].lora_A["default"], model.base_model.model[0].lora_B["default"]


def test_the_rank_is_written_into_it():
    assert factors(made()[1])[0].weight.shape == (2, 8)


def test_zero_b_is_written_into_it():
    assert not factors(made()[1])[1].weight.any()


def test_class_of_the_factor():
    assert type(factors(made()[1])[0]) is torch.nn.Linear


def test_saved_and_loaded(tmp_path):
    _, model = made(init_lora_weights=False)
    x = torch.ones(1, 8)
    expected = model(x)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8))
    assert not torch.allclose(plain(x), expected)
    assert torch.allclose(PeftModel.from_pretrained(plain, tmp_path)(x), expected, atol=1e-6)


def test_fails_in_any_case():
    made()
    raise AssertionError


def test_makes_no_adapter():
    pass
"""


def in_a_fork(command: list[str], *, cwd: Path, env: dict[str, str], **_: Any) -> None:
    """``python -m pytest`` of the command, in a process that has imported its libraries already."""
    assert command[1:3] == ["-m", "pytest"]
    run_forked(
        """
        import os, sys
        import pytest
        # This suite's own tests, whose name the copied ones have.
        for name in [n for n in sys.modules if n.partition(".")[0] == "tests"]:
            del sys.modules[name]
        os.environ.update(env)
        os.chdir(folder)
        sys.path[:0] = [folder, *env["PYTHONPATH"].split(os.pathsep)]
        result = int(pytest.main(words))
        """,
        folder=cwd,
        env=env,
        words=command[3:],
    )


@pytest.mark.slow
def test_failures_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the five runs the first is a new interpreter's."""
    whole, kinds = subprocess.run, []

    def run(command: list[str], **settings: Any) -> Any:
        kinds.append(settings["env"]["PEFT_SUITE_KIND"])
        return (in_a_fork if kinds[1:] else whole)(command, **settings)

    monkeypatch.setattr(suite.subprocess, "run", run)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "tests" / "test_made.py").write_text(MADE)
    records = tmp_path / "records"
    records.mkdir()
    found = suite._compare(
        "test_made",
        tmp_path,
        argparse.Namespace(records=records, again=False, only="", anchored_alone=False),
    )
    assert kinds == ["anchored", "stock", "unanchored", "twice-the-rank", "same-numbers"]
    assert found["counts"] == {
        "tests": 5,
        "stock": 4,
        "stock failed": 1,
        "anchored": 1,
        "unanchored": 4,
        "refused": 0,
    }
    names = {
        kind: [t.rpartition("::")[2] for t in found[kind]] for kind in found if kind != "counts"
    }
    assert names == {
        "rank": ["test_the_rank_is_written_into_it"],
        "numbers": ["test_zero_b_is_written_into_it"],
        "remedy": [],
        "ours": ["test_class_of_the_factor"],
        "unanchored": [],
    }
