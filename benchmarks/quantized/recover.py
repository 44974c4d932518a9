"""What closed-form starts give back of what quantization took, before any training.

    python -m benchmarks.quantized.recover --model smollm2 --output recovery-smollm2.jsonl
    python -m benchmarks.quantized.recover --table benchmarks/quantized/results

A model, its weights replaced by their quantized copies. Statistics are taken of some rows of a data set, of the
quantized model and of the full-precision one; on other rows of the same is measured how far the model is from
the full-precision one, and its loss (``measures.py``). Data: Python's manual, or tasks (``token_rows.py``).

Every closed form's start of rank r is the first r terms of that of a higher rank. So each is solved once, at
the highest rank asked for, and measured at all; but for those whose ranks are shared out over the layers, which
are solved at every rank. One JSON line a start; what ``--output`` holds is left out.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import lorainit
from benchmarks.common import json_lines
from benchmarks.common.clock import Clock as Stopwatch
from benchmarks.common.provenance import provenance
from benchmarks.quality.time_limit import Clock, OutOfTime
from benchmarks.quantized import peft_loftq
from benchmarks.quantized.bases import BASES, Case, Split
from benchmarks.quantized.quantizers import QUANTIZERS, quantize
from benchmarks.quantized.recovery_tables import (
    KINDS,
    NOTHING,
    PEFT_ONE,
    PEFT_OTHER,
    Record,
    key,
    read,
    tables,
)
from benchmarks.quantized.token_rows import TEXT
from benchmarks.quantized.token_rows import read as read_rows
from benchmarks.quantized.token_rows import write as write_rows
from benchmarks.quantized.write_rows import LENGTH, ROWS, default_path, rows_of

METHODS: dict[str, Any] = {
    "LoftQ": lorainit.LoftQ(),
    "QERA diagonal": lorainit.QERA("diagonal"),
    "QERA": lorainit.QERA(),
    "both sides": lorainit.KroneckerQER(),
    "both sides, ranks shared": lorainit.KroneckerQER(rho=4),
}

PEFT = "PEFT loftq"
"""PEFT's own function, at two scalings (``peft_loftq.py``)."""

NEEDS = lorainit.KroneckerQER().needs


def lora(rank: int, **adapter: Any) -> LoraConfig:
    # rsLoRA with alpha 16: a scaling that is not one, which a start has to divide out.
    adapter = adapter or {"target_modules": "all-linear"}
    return LoraConfig(r=rank, lora_alpha=16, use_rslora=True, **adapter)


class Rounded:
    """One model on one grid after another."""

    def __init__(self, full: nn.Module, config: LoraConfig) -> None:
        self.full, self.config = full, config
        self.model: Any = copy.deepcopy(full)
        self._kept: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def on(self, kind: str) -> nn.Module:
        """The model with its weights on this grid; made once, then put in place."""
        self.model.load_state_dict(self.full.state_dict())
        before, own = dict(self.full.named_parameters()), dict(self.model.named_parameters())
        if kind in self._kept:
            for name, weight in self._kept[kind].items():
                own[name].copy_(weight)
        else:
            quantize(self.model, kind, self.config)
            self._kept[kind] = {
                name: p.detach().clone() for name, p in own.items() if not p.equal(before[name])
            }
        found: nn.Module = self.model
        return found


@dataclass
class Trial:
    """One case on one grid.

    Attributes:
        case: model, data and measure.
        rounded: its model, to be put on the grid.
        kind: the grid.
        of_full: statistics of the full-precision model, kept over the grids.
    """

    case: Case
    rounded: Rounded
    kind: str
    of_full: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rounded.on(self.kind)
        self.before = self.case.measure(self.rounded.model)
        self._of_quantized: Any = None
        self.seconds: dict[str, float] = {}

    def statistics(self, of: str, device: torch.device) -> Any:
        """Of the model on the grid, or of the full-precision one for use on the grid."""
        if of == "none":
            return None
        watch, adapter = Stopwatch(device), lora(8, **self.case.adapter)
        how = {"data": self.case.data, "needs": NEEDS, "progress": False, **self.case.collect}
        if of == "full":
            if not self.of_full:
                with watch.stretch("statistics"):
                    found = lorainit.collect_statistics(self.case.full, adapter, **how)
                # Without the fingerprints, by which the package knows whose statistics they are.
                self.of_full["found"] = lorainit.Statistics(found, found.metadata)
                self.of_full["seconds"] = watch.seconds["statistics"]
            self.seconds["full"] = self.of_full["seconds"]
            return self.of_full["found"]
        if self._of_quantized is None:
            with watch.stretch("statistics"):
                self._of_quantized = lorainit.collect_statistics(self.rounded.model, adapter, **how)
            self.seconds["quantized"] = watch.seconds["statistics"]
        return self._of_quantized

    def line(
        self, method: str, of: str, ranks: Sequence[int], device: torch.device
    ) -> Iterator[dict[str, Any]]:
        """A method's figures at every rank, solved at the highest of them, or at each."""
        each = getattr(METHODS[method], "rho", 1) > 1
        for some in [[rank] for rank in ranks] if each else [ranks]:
            yield from self._solved(method, of, some, device)

    def _solved(
        self, method: str, of: str, ranks: Sequence[int], device: torch.device
    ) -> Iterator[dict[str, Any]]:
        """At every rank, solved at the highest of them."""
        top, watch = max(ranks), Stopwatch(device)
        statistics = self.statistics(of, device)
        with watch.stretch("solve"):
            model = lorainit.get_peft_model(
                self.rounded.model, lora(top, **self.case.adapter), method=METHODS[method],
                statistics=statistics, reference_weights=self.case.full, progress=False,
            )  # fmt: skip
        seconds = {"solve": round(watch.seconds["solve"], 2)}
        if statistics is not None:
            seconds["statistics"] = round(self.seconds[of], 2)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        for rank in sorted(ranks, reverse=True):
            if rank < top:
                cut(model, rank)
            yield {
                "method": method, "statistics": of, "rank": rank, "solved_at_rank": top,
                "parameters": parameters * rank // top, "s": 16 / math.sqrt(top),
                "seconds": seconds, **self.case.measure(model),
            }  # fmt: skip
        self.rounded.model = model.unload()


@torch.no_grad()
def cut(model: PeftModel, rank: int) -> None:
    """Leave the first `rank` terms of every layer's adapter; the others are zero."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for factor in module.lora_B.values():
                factor.weight[:, rank:] = 0.0


def lines(options: argparse.Namespace, kind: str) -> list[tuple[str, str]]:
    """Methods on a grid, each with the model that its statistics are of."""
    found = [(NOTHING, "none")]
    for method in options.methods:
        if method == PEFT:
            # bitsandbytes' plain four bits alone.
            found += [(PEFT, "none")] if kind == "nf4" else []
        elif METHODS[method].needs:
            found += [(method, of) for of in options.statistics]
        else:
            found.append((method, "none"))
    return found


def wanted(common: Record, line: tuple[str, str], ranks: Sequence[int]) -> set[tuple[Any, ...]]:
    """Keys of the records that a line makes."""
    method, of = line
    names = (PEFT_ONE, PEFT_OTHER) if method == PEFT else (method,)
    places = [0] if method == NOTHING else ranks
    return {
        key({**common, "method": name, "statistics": of, "rank": rank})
        for name in names
        for rank in places
    }


def run(options: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Records that are not there yet. Raises ``OutOfTime`` before a line that would not end in time."""
    clock, device, base = (
        Clock(options.time_limit),
        torch.device(options.device),
        BASES[options.model],
    )
    pools = rows_to_read(options)
    split = Split(pools, options.rows, options.held_out, options.batch, device, options.folder)
    rounded, longest = None, 0.0
    for data in options.data or [TEXT, *base.tasks]:
        common = {
            "model": base.title, "data": data, "rows": options.rows, "held_out": options.held_out,
            "length": pools[data].length,
        }  # fmt: skip
        left = {
            kind: [
                line
                for line in lines(options, kind)
                if wanted({**common, "kind": kind}, line, options.ranks) - done
            ]
            for kind in options.kinds
        }
        if not any(left.values()):
            continue
        case = base.case(split, data)
        if rounded is None or rounded.full is not case.full:
            rounded = Rounded(case.full, lora(8, **case.adapter))
        full_loss = case.measure(case.full).get("loss")
        of_full: dict[str, Any] = {}
        for kind, of_kind in left.items():
            if not of_kind:
                continue
            clock.check(longest)
            trial = Trial(case, rounded, kind, of_full)
            same = {**common, "kind": kind, "batch": options.batch, **provenance(device)}
            same |= {f"{name}_before": value for name, value in trial.before.items()}
            if full_loss is not None:
                same["full_loss"] = full_loss
            for line in of_kind:
                clock.check(longest)
                began = time.perf_counter()
                for found in figures(trial, line, options.ranks, device):
                    yield {**same, **found}
                longest = max(longest, time.perf_counter() - began)


def figures(
    trial: Trial, line: tuple[str, str], ranks: Sequence[int], device: torch.device
) -> Iterator[dict[str, Any]]:
    """What one line says, at every rank."""
    method, of = line
    if method == NOTHING:
        yield {"method": NOTHING, "statistics": "none", "rank": 0, **trial.before}
    elif method == PEFT:
        for found in peft_loftq.measured(trial.case, ranks, device):
            yield {"statistics": "none", **found}
    else:
        yield from trial.line(method, of, ranks, device)


def rows_to_read(options: argparse.Namespace) -> dict[str, Any]:
    """The rows of a file, made in the cache where none is given."""
    path = options.rows_file or default_path(options.model)
    if options.rows_file is None and not path.exists():
        tasks = BASES[options.model].tasks
        write_rows(rows_of(options.model, tasks, ROWS, LENGTH), path)
    pools: dict[str, Any] = read_rows(path)
    return pools


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    found.add_argument("--model", default="smollm2", choices=BASES)
    found.add_argument("--kinds", nargs="+", default=list(KINDS), choices=QUANTIZERS)
    found.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 32, 64])
    found.add_argument("--methods", nargs="+", choices=[*METHODS, PEFT], default=list(METHODS))
    found.add_argument(
        "--statistics", nargs="+", choices=["quantized", "full"], default=["quantized", "full"],
        help="of which model",
    )  # fmt: skip
    found.add_argument("--data", nargs="+", help="text and tasks; by default all of the model's")
    found.add_argument("--rows", type=int, default=64, help="for the statistics")
    found.add_argument("--held-out", type=int, default=64, help="rows to measure on")
    found.add_argument("--batch", type=int, default=8, help="rows a batch")
    found.add_argument("--rows-file", type=Path, help="of benchmarks.quantized.write_rows")
    found.add_argument("--folder", type=Path, help="a packed model, in place of the cache's")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument(
        "--time-limit", type=float, help="seconds; no line is begun that would not end"
    )
    found.add_argument("--output", type=Path)
    found.add_argument(
        "--table", type=Path, metavar="FOLDER", help="print the records' tables alone"
    )
    return found


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.table is not None:
        print(tables(read(options.table)))
        return
    out = options.output
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    done = {key(r) for r in json_lines.read(out)} if out is not None and out.exists() else set()
    try:
        for record in run(options, done):
            json_lines.say(record, out)
    except OutOfTime:
        print("out of time: the same call goes on from here")


if __name__ == "__main__":
    main()
