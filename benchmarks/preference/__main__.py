"""DPO from every start, at every rate and seed: reward margin and accuracy on pairs that were not trained on.

    python -m benchmarks.preference --out preference.jsonl --task chain_sum --steps 200

One line of JSON a run; runs whose line is there already are passed over, so that the command can be
called again after an interruption. ``--rates suggested`` takes the rate that comes with the start, where the
package suggests one. ``--table`` prints means over seeds, each method at its best rate on the validation pairs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

import lorainit
from benchmarks.common.json_lines import read, say
from benchmarks.common.models import smollm2_folder
from benchmarks.preference.data import pairs
from lorainit.methods import METHODS

SUGGESTED = "suggested"
KEY = ("task", "method", "asked_rate", "seed", "rank", "steps", "pairs")


def run(
    options: argparse.Namespace, folder: Path, method: str, rate: str, seed: int
) -> dict[str, Any]:
    """One training: what was asked for, and what came of it."""
    set_seed(seed)
    words = AutoTokenizer.from_pretrained(folder)
    dtype = torch.float32 if options.cpu else torch.bfloat16
    chosen_rate = {} if rate == SUGGESTED else {"learning_rate": float(rate)}
    sets = {
        name: Dataset.from_list(pairs(options.task, name, size))
        for name, size in (
            ("train", options.pairs),
            ("validation", options.held),
            ("test", options.held),
        )
    }
    with tempfile.TemporaryDirectory() as place:
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
            args=DPOConfig(
                output_dir=place,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch,
                per_device_eval_batch_size=options.batch,
                warmup_steps=max(1, options.steps // 20),
                beta=options.beta,
                precompute_ref_log_probs=True,
                gradient_checkpointing=False,
                bf16=not options.cpu,
                use_cpu=options.cpu,
                save_strategy="no",
                disable_tqdm=True,
                report_to=[],
                seed=seed,
                **chosen_rate,
            ),
            train_dataset=sets["train"],
            eval_dataset={name: sets[name] for name in ("validation", "test")},
            processing_class=words,
            peft_config=LoraConfig(
                r=options.rank,
                lora_alpha=options.rank,
                use_rslora=True,
                target_modules="all-linear",
            ),
        )
        before = trainer.args.learning_rate
        lorainit.start_trainer(
            trainer,
            METHODS[method](),
            max_sequences=options.sequences,
            set_learning_rate=rate == SUGGESTED,
            progress=False,
        )
        used = trainer.args.learning_rate
        found: dict[str, Any] = {"suggestion": rate != SUGGESTED or used != before, "rate": used}
        if found["suggestion"]:
            trainer.train()
            trainer.evaluate()
            for split in ("validation", "test"):
                # TRL logs its metrics beside each set's loss, and does not return them.
                logs = trainer.state.log_history
                entry = next(e for e in reversed(logs) if f"eval_{split}_loss" in e)
                found[f"{split}_loss"] = entry[f"eval_{split}_loss"]
                for name in ("margins", "accuracies"):
                    found[f"{split}_{name}"] = next(
                        value for key, value in entry.items() if key.endswith(f"rewards/{name}")
                    )
    asked = (options.task, method, rate, seed, options.rank, options.steps, options.pairs)
    return dict(zip(KEY, asked, strict=True)) | found


def table(records: list[dict[str, Any]]) -> str:
    """Each method at its best rate on the validation pairs, and at the suggested one."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if "test_margins" in record:
            groups[record["method"], record["asked_rate"]].append(record)

    def mean(rows: list[dict[str, Any]], name: str) -> float:
        return statistics.mean(row[name] for row in rows)

    lines = ["| method | rate | seeds | margin | accuracy |", "|---|---|---|---|---|"]
    for method in dict.fromkeys(name for name, _ in groups):
        tuned = {r: rows for (m, r), rows in groups.items() if m == method and r != SUGGESTED}
        shown = [max(tuned, key=lambda r: mean(tuned[r], "validation_accuracies"))] if tuned else []
        shown += [SUGGESTED] if (method, SUGGESTED) in groups else []
        for rate in shown:
            rows = groups[method, rate]
            margin, accuracy = mean(rows, "test_margins"), mean(rows, "test_accuracies")
            lines.append(f"| {method} | {rate} | {len(rows)} | {margin:.3f} | {accuracy:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a folder; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--task", default="chain_sum")
    parser.add_argument("--methods", default="vanilla,lora-da,natural,eva,auto")
    parser.add_argument("--rates", default=f"1e-5,3e-5,1e-4,3e-4,1e-3,{SUGGESTED}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=2048)
    parser.add_argument("--held", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    known = read(options.out) if options.out.exists() else []
    if options.table:
        print(table(known))
        return
    folder = options.model or smollm2_folder()
    done = {tuple(record[name] for name in KEY) for record in known}
    for seed in range(options.seeds):
        for method in options.methods.split(","):
            for rate in options.rates.split(","):
                key = (options.task, method, rate, seed, options.rank, options.steps, options.pairs)
                if key not in done:
                    say(run(options, folder, method, rate, seed), options.out)


if __name__ == "__main__":
    main()
