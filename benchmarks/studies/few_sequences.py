"""A length measured on few sequences: what it promises, and what it brings on sequences that nobody saw.

    python -m benchmarks.studies.few_sequences --tasks chain_sum movies --records 8 16 --seeds 0 1 --out OUT
    python -m benchmarks.studies.few_sequences --table

Natural's step from few records, sentences with their head fitted first. A record keeps the gain that was
measured on the held-back sequences, with its standard error, and the same over a part of the test split.
Every step is taken, clear or not, so any rule can be tried on the records. What came out stands in
docs/natural.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import lorainit
from benchmarks.common.cache import REPOSITORY
from benchmarks.quality.data.classification import SENTIMENT, load_labelled, prepare_labelled
from benchmarks.quality.data.files import default_folder, load_pools, prepare
from benchmarks.quality.data.order import training_rows
from benchmarks.quality.data.pools import Pool
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.initialization import lora_config
from benchmarks.quality.models.loading import choose_device, load_model
from benchmarks.quality.models.registry import KINDS
from benchmarks.quality.records import append, provenance, read_records
from benchmarks.studies import RESULTS
from lorainit.adapters.origin import origin_of
from lorainit.calibration import paired

MINILM = "all-minilm-l6-v2"


def pools_of(task: str, folder: Path) -> dict[str, Pool]:
    """The splits of a task, made if they are not there."""
    if task not in SENTIMENT:
        prepare(task, folder)
        return load_pools(task, folder)
    path = folder / f"{task}.npz"
    return load_labelled(path if path.is_file() else prepare_labelled(task, folder))


@torch.no_grad()
def losses_of(model: Any, pool: Pool, device: torch.device) -> paired.SequenceLosses:
    """Of every sequence of a pool."""
    found = []
    for batch in pool.batches(list(range(len(pool))), 32):
        moved = {key: value.to(device) for key, value in batch.items()}
        labels = moved.pop("labels")
        logits = model(**moved).logits.float()
        if labels.dim() == 1:
            found.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
            continue
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].mT, labels[:, 1:], ignore_index=-100, reduction="none"
        )
        found.append(each.sum(1) / (labels[:, 1:] != -100).sum(1))
    losses = torch.cat(found).cpu()
    return paired.SequenceLosses(losses, len(losses), len(losses))


def case(
    model: Any, task: str, seed: int, records: int, pools: dict[str, Pool], device: torch.device
) -> dict[str, Any]:
    """One start, and what it is worth."""
    kind = MINILM if task in SENTIMENT else "smollm2-135m-instruct"
    KINDS[kind].seed_head(model, seed)
    torch.manual_seed(seed)
    rows = training_rows(len(pools["train"]), 2048, seed)[:records].tolist()
    wrapped = lorainit.get_peft_model(
        model,
        lora_config(Experiment(task, "natural", 1e-3, seed, model=kind)),
        method=lorainit.Natural(),
        data=pools["train"].batches(rows, 8),
        progress=False,
    )
    origin = origin_of(wrapped, "default")
    assert origin is not None
    try:
        after = losses_of(wrapped.eval(), pools["test"], device)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        # The same head, without the step.
        before = losses_of(wrapped, pools["test"], device)
    finally:
        wrapped.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
    true = paired.gain(before, after)
    return {
        "measured": origin.measured,
        "heads": origin.heads,
        "true": {"base": float(before.losses.mean()), "gain": true.mean, "error": true.error},
    }


def table() -> str:
    """One line a case, in Markdown."""
    lines = [
        "| task | records | seed | measured on | gain measured | its errors | gain on the test split |",
        "|" + " --- |" * 7,
    ]
    found = read_records([RESULTS], "few_sequences").values()
    for r in sorted(found, key=lambda r: (r["task"], r["records"], r["seed"])):
        m = r["measured"]
        gain = m["base_loss"] - m["start_loss"]
        errors = f"{gain / m['gain_error']:.1f}" if m.get("gain_error") else "-"
        lines.append(
            f"| {r['task']} | {r['records']} | {r['seed']} | {m.get('sequences', 0):.0f} | {gain:.3f} | "
            f"{errors} | {r['true']['gain']:.3f} ± {r['true']['error']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["movies", "chain_sum"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--records", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--test", type=int, default=256, help="sequences of the test split")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "outputs" / "few-sequences")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    # Every step is taken: what a rule would have said is read off the records.
    paired.Gain.clear = property(lambda self: self.mean > 0)  # type: ignore[method-assign, assignment]
    done = set(read_records([RESULTS, arguments.out], "few_sequences"))
    device = choose_device()
    for task in arguments.tasks:
        model = load_model(None, device, MINILM if task in SENTIMENT else "smollm2-135m-instruct")
        pools = pools_of(task, default_folder())
        pools["test"] = pools["test"].first(arguments.test)
        for records in arguments.records:
            for seed in arguments.seeds:
                key = f"{task}-{records}-{seed}"
                if key in done:
                    continue
                record = case(model, task, seed, records, pools, device)
                record |= {"id": key, "task": task, "seed": seed, "records": records}
                append(
                    arguments.out, record | provenance(arguments.commit, device), "few_sequences"
                )
                print(key, record["measured"], record["true"], flush=True)


if __name__ == "__main__":
    main()
