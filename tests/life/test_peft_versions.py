"""What is saved loads in stock PEFT of three versions back, with the same outputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorainit
from tests.adapters import tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

VERSIONS = ["0.18.1", "0.19.1", "0.20.0"]
CACHE = Path(__file__).parents[2] / ".cache" / "peft"

LOAD = """
    # PEFT 0.18 does not import beside the newest torchao, which it looks for by its spec.
    import importlib.util, importlib.metadata
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a: None if name.startswith("torchao") else found(name, *a)
    sys.path.insert(0, peft_folder)
    import peft, torch
    from safetensors.torch import load_file, save_file
    from transformers import LlamaForCausalLM
    inputs = load_file(f"{root}/inputs.safetensors")
    out = {}
    for name in names:
        base = LlamaForCausalLM.from_pretrained(f"{root}/base").eval()
        model = peft.PeftModel.from_pretrained(base, f"{root}/{name}").eval()
        with torch.no_grad():
            logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        out[name] = logits.contiguous()
    save_file(out, f"{root}/logits-{version}.safetensors")
    result = [peft.__version__, "lorainit" in sys.modules]
"""


def peft_of(version: str) -> Path:
    """PEFT alone, of one version, installed beside the environment and kept."""
    folder = CACHE / version
    if not (folder / "peft").is_dir():
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            + ["--target", str(folder), f"peft=={version}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"no package index: {done.stderr[-300:]}")
    return folder


CONFIGURATIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {".*q_proj": 2}},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    root = tmp_path_factory.mktemp("saved")
    tiny.llama().save_pretrained(root / "base")
    save_file(tiny.batch(seed=9), root / "inputs.safetensors")
    live = {}
    for kind in ("displaced", "anchored"):
        for name, changes in CONFIGURATIONS.items():
            lora = tiny.config(**changes)
            model = tiny.train(tiny.start(tiny.llama(), tiny.METHODS[kind], lora))
            model.save_pretrained(root / f"{kind}-{name}")
            lorainit.export(model, root / f"{kind}-{name}-exported")
            live[f"{kind}-{name}"] = live[f"{kind}-{name}-exported"] = tiny.logits(model)
    return root, live


@pytest.mark.parametrize("version", VERSIONS)
def test_loads_in_an_older_peft(version: str, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    root, live = saved
    result = tiny.run_fresh(
        LOAD, peft_folder=str(peft_of(version)), root=str(root), names=list(live), version=version
    )
    assert result == [version, False]
    found = load_file(root / f"logits-{version}.safetensors")
    for name, expected in live.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=2e-6)


EXPERTS = """
    import importlib.util
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a: None if name.startswith("torchao") else found(name, *a)
    sys.path.insert(0, peft_folder)
    import peft, torch
    from tests.life import test_experts as t
    method = t.METHODS["displaced"]
    statistics = t.collected(t.mixtral(), [t.batch()], needs=method.needs)
    targets = t.match_targets(t.mixtral(), t.lora()).layers
    deltas = t.expert_deltas(t.some(method, t.mixtral()))
    errors = []
    for name in statistics:
        if "experts" in name:
            spec, weight = targets[name].spec, targets[name].module.weight
            pair = method.solve(weight, statistics[name], spec.rank, spec.scaling)
            expected = spec.scaling * pair.B @ pair.A
            errors.append(float((deltas[name] - expected).norm() / expected.norm()))
    anchored = t.some(t.METHODS["anchored"], t.mixtral())
    start = float((t.logits(anchored) - t.logits(t.mixtral())).abs().max())
    live = t.logits(t.train(anchored, rate=0.5))
    again = 0.0
    # PEFT 0.19 translates names by a class of transformers that has changed since, for any Mixtral.
    if version != "0.19.1":
        anchored.save_pretrained(f"{root}/{version}")
        loaded = peft.PeftModel.from_pretrained(t.mixtral(), f"{root}/{version}")
        again = float((t.logits(loaded) - live).abs().max())
    result = [peft.__version__, max(errors), len(errors), start, again]
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_experts_are_started_in_an_older_peft(version: str, tmp_path: Path) -> None:
    """Whose layout of a stacked parameter's factors is another."""
    found, error, count, start, again = tiny.run_fresh(
        EXPERTS, peft_folder=str(peft_of(version)), root=str(tmp_path), version=version
    )
    assert found == version
    assert count > 8
    assert error < 1e-4
    assert start < 1e-6
    assert again < 2e-6
