"""What closed-form starts give back of what quantization took, before any training.

    python -m benchmarks.quantized.recover --kinds nf4 rtn3 rtn2 --ranks 8 32

SmolLM2-135M, whose own weights are dequantized 4-bit ones (affine, groups of 32), quantized again on another
grid. Statistics are taken of the quantized model on some rows; on other rows are measured the divergence
``KL(full || quantized)`` a position and the loss, beside the full-precision model's. One JSON line a start,
kept in ``results/recovery.jsonl`` by ``--output``, and a table at the end. Text: Python's own manual
(``pydoc_data``), or a task that ``benchmarks.quality.data`` prepared.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

import lorainit
from benchmarks.common.models import load_smollm2, load_smollm2_tokenizer
from benchmarks.quality.data.files import default_folder, load_pools
from benchmarks.quantized.quantizers import QUANTIZERS, quantize

METHODS: dict[str, Any] = {
    "LoftQ": lorainit.LoftQ(),
    "QERA diagonal": lorainit.QERA("diagonal"),
    "QERA": lorainit.QERA(),
    "both sides": lorainit.KroneckerQER(),
}

NAMES = {"both sides": "KroneckerQER", "QERA diagonal": 'QERA("diagonal")'}
"""Of methods whose records have another name than their class."""


def text_rows(tokenizer: Any, rows: int, length: int) -> Tensor:
    """``(rows, length)`` tokens of English prose, evenly from the whole text."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    whole = tokens[: len(tokens) // length * length].reshape(-1, length)
    return whole[torch.linspace(0, len(whole) - 1, rows).long()]


def text_batches(tokenizer: Any, rows: int, length: int, size: int) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": part, "labels": part}
        for part in text_rows(tokenizer, rows, length).split(size)
    ]


def task_batches(task: str, folder: Path, rows: int, size: int) -> list[dict[str, Tensor]]:
    """Problems and answers of a prepared task, the answers labelled."""
    return load_pools(task, folder)["train"].batches(range(rows), size)


@torch.no_grad()
def logprobs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``(positions, vocabulary)`` where a label follows, and those labels."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    logits = model(**inputs).logits[:, :-1][kept].float()
    return logits.log_softmax(-1), labels[kept]


def measured(
    model: nn.Module, batches: list[dict[str, Tensor]], full: list[Tensor]
) -> tuple[float, float]:
    """``KL(full || model)`` and the loss, means over positions."""
    total = torch.zeros(3, dtype=torch.float64)
    for batch, wanted in zip(batches, full, strict=True):
        found, labels = logprobs(model.eval(), batch)
        kl = (wanted.exp() * (wanted - found)).sum(-1).sum()
        loss = -found.gather(1, labels.unsqueeze(1)).sum()
        total += torch.tensor([float(kl), float(loss), float(len(labels))], dtype=torch.float64)
    return float(total[0] / total[2]), float(total[1] / total[2])


def lora(rank: int) -> LoraConfig:
    # rsLoRA with alpha 16: a scaling that is not one, which a start has to divide out.
    return LoraConfig(r=rank, lora_alpha=16, use_rslora=True, target_modules="all-linear")


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    tokenizer = load_smollm2_tokenizer()
    if options.data == "text":
        batches = text_batches(
            tokenizer, options.rows + options.held_out, options.length, options.batch
        )
    else:
        batches = task_batches(
            options.data, options.folder, options.rows + options.held_out, options.batch
        )
    batches = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
    # Every so many rows one is held out, so that both are of the same kind.
    every = (options.rows + options.held_out) // options.held_out
    held = batches[every - 1 :: every]
    data = [b for i, b in enumerate(batches) if i % every != every - 1]
    reference = load_smollm2(device=device)
    wanted = [logprobs(reference, batch)[0] for batch in held]
    _, full_loss = measured(reference, held, wanted)
    needs = lorainit.KroneckerQER().needs
    for kind in options.kinds:
        base = copy.deepcopy(reference)
        quantize(base, kind, lora(8))
        kl, loss = measured(base, held, wanted)
        common = {
            "model": "SmolLM2-135M", "kind": kind, "data": options.data, "rows": options.rows,
            "held_out": options.held_out, "length": options.length, "full_loss": full_loss,
            "kl_before": kl, "loss_before": loss, "torch": torch.__version__,
            "lorainit": lorainit.__version__,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        }  # fmt: skip
        yield {**common, "method": "nothing", "rank": 0, "kl": kl, "loss": loss}
        began = time.monotonic()
        statistics = lorainit.collect_statistics(base, lora(8), data=data, needs=needs)
        collecting = time.monotonic() - began
        for rank in options.ranks:
            for name, method in METHODS.items():
                if options.methods and name not in options.methods:
                    continue
                began = time.monotonic()
                model = lorainit.get_peft_model(
                    base, lora(rank), method=method, statistics=statistics, reference_weights=reference
                )  # fmt: skip
                solving = time.monotonic() - began
                kl, loss = measured(model, held, wanted)
                base = model.unload()
                yield {
                    **common, "method": name, "rank": rank, "kl": kl, "loss": loss,
                    "seconds": {"statistics": round(collecting, 1), "solve": round(solving, 1)},
                }  # fmt: skip


def share_gone(record: Mapping[str, Any], name: str) -> float:
    """What share of the ``"kl"`` or of the rise of the ``"loss"`` that quantization brought is gone."""
    least = 0.0 if name == "kl" else record["full_loss"]
    before = record[f"{name}_before"]
    return float((before - record[name]) / (before - least))


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: KL and loss, and what share of each that quantization brought is gone."""
    lines = [
        "| grid, rank | start | KL | of it gone | loss | of the rise gone |",
        "|---|---|---|---|---|---|",
    ]
    for r in records:
        where = r["kind"] if r["rank"] == 0 else f"{r['kind']}, {r['rank']}"
        lines.append(
            f"| {where} | {NAMES.get(r['method'], r['method'])} | {r['kl']:.4f} | "
            f"{share_gone(r, 'kl'):.0%} | {r['loss']:.4f} | {share_gone(r, 'loss'):.0%} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=["nf4", "rtn3", "rtn2"], choices=QUANTIZERS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--data", default="text", help="text, or a prepared task")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="prepared tasks")
    parser.add_argument("--rows", type=int, default=64, help="for the statistics")
    parser.add_argument("--held-out", type=int, default=64, help="rows to measure on")
    parser.add_argument("--length", type=int, default=128, help="tokens a row of text")
    parser.add_argument("--batch", type=int, default=1, help="rows a batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    records = []
    for record in run(options):
        records.append(record)
        print(json.dumps(record), flush=True)
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            with options.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
