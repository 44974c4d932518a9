"""What the demo does, in numbers, and the key under which a finished result is found again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import lorainit
from benchmarks.common.cache import REPOSITORY

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "reasoning-gym")


@dataclass(frozen=True)
class Settings:
    """One run of the demo; every method gets the same.

    Attributes:
        task: one of `benchmarks.common.tasks.TASKS`.
        max_length: longest sequence, in tokens.
        statistics_sequences: prompts that the statistics read, in no other split.
        statistics_batch: prompts a batch in that pass.
        rank, alpha: of the adapters, on every linear layer, under rsLoRA.
        steps, batch_size, warmup_steps: of the fine-tune, for every line alike.
        rate_sequences: of those, how many the learning rate is measured on.
        held_out: test problems that are scored.
        score_steps: optimizer steps after which they are scored; 0 and the last are always.
        score_batch: problems a batch in scoring.
        seed: of the data, the adapters' random parts and the Trainer.
    """

    task: str = "chain_sum_short"
    max_length: int = 48
    statistics_sequences: int = 32
    statistics_batch: int = 16
    rank: int = 8
    alpha: int = 16
    rate_sequences: int = 24
    steps: int = 16
    batch_size: int = 6
    warmup_steps: int = 2
    held_out: int = 48
    score_steps: tuple[int, ...] = (10,)
    score_batch: int = 16
    seed: int = 0

    @property
    def scored_at(self) -> tuple[int, ...]:
        inner = (step for step in self.score_steps if 0 < step < self.steps)
        return (0, *inner, self.steps)

    def smoke(self) -> Settings:
        """The same path through the code, in a minute or two."""
        return replace(
            self,
            statistics_sequences=8,
            statistics_batch=4,
            rate_sequences=8,
            steps=3,
            held_out=8,
            score_steps=(1,),
        )


@dataclass(frozen=True)
class Entry:
    """A line of the demo, and how it is shown; without a `rate`, that is measured."""

    name: str
    label: str
    method: lorainit.Method
    color: str
    rate: float | None = None


def entries() -> dict[str, Entry]:
    """The lines that the demo knows, by the name they have on the command line."""
    known = (
        Entry("lora", "LoRA at 2e-4", lorainit.Vanilla(), "#9ca3af", 2e-4),
        Entry("lora-suggested", "LoRA", lorainit.Vanilla(), "#4b5563"),
        Entry("auto", "lorainit's default", lorainit.Auto(), "#009e73"),
        Entry("lora-da", "LoRA-DA", lorainit.LoraDA(), "#0072b2"),
        Entry("filet", "FILet", lorainit.FILet(), "#d55e00"),
        Entry("natural", "Natural", lorainit.Natural(), "#cc79a7"),
    )
    return {entry.name: entry for entry in known}


def result_key(settings: Settings, entry: Entry | None) -> str:
    """Digest of all that decides a result: settings, method, versions, and the code itself."""
    parts = {
        "settings": asdict(settings),
        "line": repr(entry) if entry else "base",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "source": _source_digest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _source_digest() -> str:
    """Of the package and of the demo's own computing parts, so that no stale result is shown."""
    package = Path(lorainit.__file__).parent
    demo = REPOSITORY / "benchmarks" / "demo"
    files = sorted(package.rglob("*.py"))
    files += sorted((REPOSITORY / "benchmarks" / "common").glob("*.py"))
    files += [demo / name for name in ("run.py", "four_bits.py", "reload.py")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
