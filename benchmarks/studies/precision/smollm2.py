"""Twelve layers of SmolLM2: ``fast`` beside ``exact``, and sums in bfloat16."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

import lorainit
from benchmarks.common.cache import REPOSITORY
from benchmarks.common.models import load_smollm2, load_smollm2_tokenizer
from benchmarks.common.subspaces import sine_between
from benchmarks.quality.initialization import start_of
from benchmarks.studies.precision.products import RANK
from lorainit.methods import FILet, LoraDA, LoraGA, LoraOne, Natural

DOCUMENTS = ("README.md", "docs/theory.md", "docs/index.md")


def sequences(tokenizer: Any, count: int, length: int = 128) -> Tensor:
    """``(count, length)`` tokens of English prose."""
    text = "".join((REPOSITORY / name).read_text(encoding="utf-8") for name in DOCUMENTS)
    return torch.tensor(tokenizer(text)["input_ids"][: count * length]).reshape(count, length)


def config() -> LoraConfig:
    """Twelve layers."""
    return LoraConfig(
        r=RANK, lora_alpha=16, use_rslora=True, layers_to_transform=[2, 15, 28],
        target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"],
    )  # fmt: skip


def distances_between(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far two starts of the same layers are from each other: largest, and median."""
    sines, changes = [], []
    for name, pair in one.items():
        (a, b), (c, d) = ([x.double() for x in p] for p in (pair, other[name]))
        sines.append(sine_between(a.mT, c.mT))
        changes.append(float((b @ a - d @ c).norm() / (d @ c).norm()))
    middle = len(sines) // 2
    return {
        "layers": len(sines), "sine": max(sines), "sine_median": sorted(sines)[middle],
        "product": max(changes), "product_median": sorted(changes)[middle],
    }  # fmt: skip


def layers() -> Iterator[dict[str, Any]]:
    """Twelve layers of SmolLM2 from 16 sequences of 128 tokens, fast beside exact."""
    model = load_smollm2()
    ids = sequences(load_smollm2_tokenizer(), 16)
    data = [{"input_ids": part, "labels": part} for part in ids.split(8)]
    needs = Natural().needs | LoraDA().needs
    statistics = lorainit.collect_statistics(
        model, config(), data=data, needs=needs, progress=False
    )
    for method in (LoraDA(), FILet(), Natural(length=1.0)):
        found, seconds = {}, {}
        for precision in ("fast", "exact"):
            began = time.process_time()
            wrapped = lorainit.get_peft_model(
                model, config(), method=method, statistics=statistics, precision=precision,
                progress=False,
            )  # fmt: skip
            seconds[precision] = time.process_time() - began
            found[precision] = start_of(wrapped).factors
            model = wrapped.unload()
        name = f"SmolLM2, {type(method).__name__}"
        yield {
            "name": name,
            **distances_between(found["fast"], found["exact"]),
            "cpu_seconds": seconds,
        }


def sums() -> Iterator[dict[str, Any]]:
    """The same layers from 32 sequences, gradients added up in bfloat16 beside float32: few batches, and many.

    And from the same sequences in a model that computes in bfloat16, which is what rounds without them.
    """
    model = load_smollm2()
    ids = sequences(load_smollm2_tokenizer(), 32)

    def statistics(rows: int, dtype: str) -> lorainit.Statistics:
        return lorainit.collect_statistics(
            model, config(), data=[{"input_ids": x, "labels": x} for x in ids.split(rows)],
            needs=LoraDA().needs, gradient_dtype=dtype, progress=False,  # type: ignore[arg-type]
        )  # fmt: skip

    def started(method: Any, found: lorainit.Statistics) -> dict[str, Any]:
        nonlocal model
        wrapped = lorainit.get_peft_model(
            model, config(), method=method, statistics=found, precision="exact", progress=False
        )
        factors = start_of(wrapped).factors
        model = wrapped.unload()
        return factors

    kinds = {"float32": statistics(8, "float32")}
    kinds |= {f"bfloat16, {32 // rows} batches": statistics(rows, "bfloat16") for rows in (8, 1)}
    model = model.to(torch.bfloat16)
    kinds["float32, model in bfloat16"] = statistics(8, "float32")
    model = load_smollm2()
    for method in (LoraGA(), LoraOne(), LoraDA()):
        wide = started(method, kinds["float32"])
        for kind, found in list(kinds.items())[1:]:
            name = f"sums in {kind}, {type(method).__name__}"
            yield {"name": name, **distances_between(started(method, found), wide)}
