"""What does a pass over convolutions cost? Statistics beside their floor, by processor time.

    python -m benchmarks.studies.convolution_pass

The floor is that of `benchmarks.speed`: one forward and backward with the gradients of all weights, over
the same batches. A residual network of 11 convolutions and linear layers on 32 x 32 images, float32, one
thread. What came out stands in docs/performance.md.
"""

from __future__ import annotations

import json
import statistics as stats
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

import lorainit
from benchmarks.studies import RESULTS

REPEATS = 7


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, out, 3, stride, 1)
        self.second = nn.Conv2d(out, out, 3, 1, 1)
        self.beside = nn.Conv2d(width, out, 1, stride)
        self.norms = nn.ModuleList([nn.GroupNorm(8, out), nn.GroupNorm(8, out)])

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.beside(x) + self.norms[1](self.second(inner)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), Block(32, 32), Block(32, 64, 2), Block(64, 128, 2)
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return scores


def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Network()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    config = LoraConfig(r=8, target_modules=names)
    data = [
        {"x": torch.randn(8, 3, 32, 32), "labels": torch.randint(0, 10, (8,))} for _ in range(4)
    ]

    def floor() -> None:
        for batch in data:
            model.zero_grad()
            losses(model, batch).mean().backward()
        model.zero_grad()

    def collect(needs: Any) -> None:
        lorainit.collect_statistics(
            model, config, data=data, needs=needs, loss_fn=losses, progress=False
        )

    kinds: dict[str, Callable[[], None]] = {
        "floor": floor,
        "gradient": lambda: collect({"gradient"}),
        "LoRA-DA": lambda: collect(lorainit.LoraDA().needs),
        "Natural": lambda: collect(lorainit.Natural().needs),
    }
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(REPEATS):
        for name, work in kinds.items():
            begin = time.process_time()
            work()
            if repeat:
                taken[name].append(time.process_time() - begin)
    middle = {name: stats.median(times) for name, times in taken.items()}
    record = {
        "torch": str(torch.__version__),
        "layers": len(names),
        "sequences": sum(len(batch["labels"]) for batch in data),
        "processor_seconds": {name: round(value, 4) for name, value in middle.items()},
        "times_the_floor": {
            name: round(value / middle["floor"], 2) for name, value in middle.items()
        },
    }
    (RESULTS / "convolution_pass.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["times_the_floor"]))


if __name__ == "__main__":
    main()
