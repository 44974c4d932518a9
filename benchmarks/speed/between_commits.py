"""The pass, and the whole start, of two commits in turns on one machine: is the newer one slower?

    git archive COMMIT src | tar -x -C OLD
    python -m benchmarks.speed.between_commits --old OLD/src --new src --device cuda --out turns.jsonl

Two processes, one a source tree, hold the same model and take turns, so that what the machine does meanwhile
falls on both. On an accelerator six layers of Llama-2-7B's shape, 64 x 512 tokens in bfloat16; on a processor
eight layers of hidden size 576, 32 x 64 tokens in float32. One JSON line a set of statistics: seconds of every
round, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import json_lines

METHODS = ("LoraDA", "FILet", "Natural")
WHOLE = "start "
"""Before a method's name: from batches to the adapter."""


def serve(device: str) -> None:
    """Answer each method's name on the standard input with the seconds of its pass, or of its start."""
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    import lorainit

    torch.manual_seed(0)
    large = device == "cuda"
    hidden, inner, layers = (4096, 11008, 6) if large else (576, 1536, 8)
    rows, tokens = (64, 512) if large else (32, 64)
    config = LlamaConfig(
        vocab_size=32000 if large else 8192,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    torch.set_default_dtype(torch.bfloat16 if large else torch.float32)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(1, config.vocab_size, (rows, tokens), device=device)
    data = [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
        for part in ids.split(8)
    ]
    lora = LoraConfig(r=8, target_modules="all-linear")
    print("ready", flush=True)
    for line in sys.stdin:
        method = getattr(lorainit, line.strip().removeprefix(WHOLE))()
        _wait(large)
        began = time.perf_counter()
        if line.startswith(WHOLE):
            wrapped = lorainit.get_peft_model(model, lora, method=method, data=data, progress=False)
        else:
            lorainit.collect_statistics(model, lora, data=data, needs=method.needs, progress=False)
        _wait(large)
        print(time.perf_counter() - began, flush=True)
        if line.startswith(WHOLE):
            wrapped.unload()


def _wait(large: bool) -> None:
    if large:
        torch.cuda.synchronize()


class Turn:
    """A process of one source tree."""

    def __init__(self, source: Path, device: str) -> None:
        command = [sys.executable, "-m", "benchmarks.speed.between_commits", "--serve"]
        self.process = subprocess.Popen(
            [*command, "--device", device],
            env={**os.environ, "PYTHONPATH": str(source.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        while (line := self._line()).strip() != "ready":
            if not line:
                raise RuntimeError(f"the process of {source} ended before it was ready")

    def seconds(self, method: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(method + "\n")
        self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


def compare(turns: dict[str, Turn], method: str, rounds: int) -> dict[str, Any]:
    """Both trees' seconds of every round, the first of which is not counted."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for index in range(rounds + 1):
        for name in list(turns) if index % 2 else reversed(list(turns)):
            seconds = turns[name].seconds(method)
            if index:
                found[name].append(seconds)
    ratio = statistics.median(n / o for n, o in zip(found["new"], found["old"], strict=True))
    return {"method": method, **found, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--old", type=Path)
    parser.add_argument("--new", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commits", nargs=2, default=[None, None], metavar=("OLD", "NEW"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.device)
        return
    if options.old is None or options.new is None:
        parser.error("give the folders of both source trees, --old and --new")
    turns = {name: Turn(getattr(options, name), options.device) for name in ("old", "new")}
    cuda = options.device == "cuda"
    for method in (*METHODS, *(WHOLE + name for name in METHODS)):
        record = compare(turns, method, options.rounds)
        record["commits"] = dict(zip(("old", "new"), options.commits, strict=True))
        record["device"] = torch.cuda.get_device_name() if cuda else platform.machine()
        record["torch"] = torch.__version__
        json_lines.say(record, options.out)


if __name__ == "__main__":
    main()
