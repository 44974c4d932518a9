"""The checks: figures, and whether they are as they should be."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import lorainit
from benchmarks.quantized.bench import METHODS, TOLERANCE, Bench, error, lora, stored

Figures = dict[str, Any]


def weights_as_the_forward_uses_them(bench: Bench) -> tuple[bool, Figures]:
    base = bench.quantized()
    worst = 0.0
    kinds = set()
    parameters = {name: id(parameter) for name, parameter in base.named_parameters()}
    first = stored(base)
    bench.logits(base)
    # As it was loaded, and after a forward has moved what it moves.
    moved = max(error(weight, first[name]) for name, weight in stored(base).items())
    same = parameters == {name: id(parameter) for name, parameter in base.named_parameters()}
    for name, weight in first.items():
        layer = base.get_submodule(name)
        kinds.add(type(layer).__module__.split(".")[0])
        x = torch.randn(16, weight.shape[1], dtype=torch.bfloat16, device=bench.device)
        with torch.no_grad():
            worst = max(worst, error(layer(x), x.float() @ weight.float().T))
    good = worst < TOLERANCE[bench.bits] and moved < 1e-2 and same and kinds == {"bitsandbytes"}
    return good, {"error": worst, "after_a_forward": moved, "same_parameters": same}


def statistics_through_the_forward(bench: Bench) -> tuple[bool, Figures]:
    base = bench.quantized()
    needs = lorainit.LoraDA().needs | lorainit.FILet().needs
    of = {
        name: lorainit.collect_statistics(
            model, lora(), data=[bench.batch()], needs=needs, progress=False
        )
        for name, model in (("quantized", base), ("plain", bench.dequantized(base)))
    }
    worst = {
        field: max(
            error(getattr(of["quantized"][n], field), getattr(of["plain"][n], field))
            for n in of["plain"]
        )
        for field in ("gradient", "input_second_moment", "output_second_moment")
    }
    limit = 3 * TOLERANCE[bench.bits]
    return len(of["quantized"]) == 14 and max(worst.values()) < limit, worst


def anchored_start_is_exact(bench: Bench) -> tuple[bool, Figures]:
    expected = bench.logits(bench.quantized())
    figures = {
        method: float((bench.logits(bench.started(method)) - expected).abs().max())
        for method in METHODS
    }
    return (
        figures["anchored"] == figures["anchored-weight"] == 0.0 < figures["displaced"],
        figures,
    )


def training_moves_the_adapter_alone(bench: Bench) -> tuple[bool, Figures]:
    figures: Figures = {}
    good = True
    for method in METHODS:
        base = bench.quantized()
        # In this order: on some CPUs the first forward lays the four bits out anew.
        expected = bench.logits(base)
        before = stored(base)
        model = bench.started(method, base)
        losses = trained(bench, model)
        same = all(torch.equal(before[n], w) for n, w in stored(model).items())
        with model.disable_adapter():
            off = float((bench.logits(model) - expected).abs().max())
        figures[method] = {"losses": losses, "base_same": same, "disabled_difference": off}
        good = good and losses[-1] < losses[0] and same and off == 0.0
    return good, figures


def saved_adapters_load(bench: Bench) -> tuple[bool, Figures]:
    figures: Figures = {}
    for method in METHODS:
        model = bench.started(method)
        trained(bench, model)
        live, folder = bench.logits(model), bench.folder / f"adapter-{method}"
        model.save_pretrained(str(folder))
        stock = PeftModel.from_pretrained(bench.quantized(), str(folder))
        ours = lorainit.load_adapter(bench.quantized(), folder)
        figures[method] = {
            "stock": error(bench.logits(stock), live),
            "load_adapter": float((bench.logits(ours) - live).abs().max()),
        }
    return (
        all(f["stock"] < TOLERANCE[4] and f["load_adapter"] == 0.0 for f in figures.values()),
        figures,
    )


def trained(bench: Bench, model: PeftModel, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = model.train()(**bench.batch()).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


CHECKS: dict[str, Callable[[Bench], tuple[bool, Figures]]] = {
    check.__name__: check
    for check in (
        weights_as_the_forward_uses_them,
        statistics_through_the_forward,
        anchored_start_is_exact,
        training_moves_the_adapter_alone,
        saved_adapters_load,
    )
}


def run(bits: list[int]) -> Iterator[dict[str, Any]]:
    """Every check of every width, failed ones with what they raised."""
    import bitsandbytes

    for width in bits:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), width)
            for name, check in CHECKS.items():
                begin = time.monotonic()
                try:
                    passed, figures = check(bench)
                except Exception as caught:
                    passed, figures = False, {"raised": f"{type(caught).__name__}: {caught}"[:600]}
                yield {
                    "check": name,
                    "bits": width,
                    "passed": passed,
                    "figures": figures,
                    "seconds": round(time.monotonic() - begin, 2),
                    "device": torch.cuda.get_device_name()
                    if bench.device == "cuda"
                    else platform.machine(),
                    "bitsandbytes": bitsandbytes.__version__,
                    "torch": torch.__version__,
                }
