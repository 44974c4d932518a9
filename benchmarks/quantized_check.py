"""bitsandbytes bases, 8-bit and 4-bit: what the package promises of them, checked one by one.

    python -m benchmarks.quantized_check [--output results.jsonl] [--bits 8 4]

A small random Llama is quantized on loading, on an accelerator where there is one, else on the CPU.
One JSON line a check, with the figures that it rests on; the exit status is that of all together.
tests/life/test_quantized.py runs the same checks where bitsandbytes is installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import lorainit

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS: dict[str, Any] = {
    "displaced": lorainit.LoraDA(),
    "anchored": lorainit.FILet(),
    "anchored-weight": lorainit.PiSSA(),
}
# Relative errors. LLM.int8 rounds a layer's inputs to eight bits as well; bfloat16 has eight bits.
TOLERANCE = {8: 5e-2, 4: 3e-2}


class Bench:
    """A base model on disk, and how to load it, quantized or not."""

    def __init__(self, folder: Path, bits: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.bits, self.folder = bits, folder
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=128,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                pad_token_id=0,
            )
            model = LlamaForCausalLM(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        parameter.mul_(3.0)
            model.to(torch.bfloat16).save_pretrained(folder / "base")

    def quantized(self) -> Any:
        from transformers import BitsAndBytesConfig, LlamaForCausalLM

        how = BitsAndBytesConfig(
            load_in_8bit=self.bits == 8,
            load_in_4bit=self.bits == 4,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return LlamaForCausalLM.from_pretrained(
            self.folder / "base",
            quantization_config=how,
            device_map={"": 0 if self.device == "cuda" else "cpu"},
            dtype=torch.bfloat16,
        ).eval()

    def dequantized(self, base: nn.Module) -> Any:
        """A plain model whose weights are those that `base` stores, dequantized."""
        from transformers import LlamaForCausalLM

        plain = LlamaForCausalLM.from_pretrained(self.folder / "base", dtype=torch.bfloat16)
        plain = plain.to(self.device).eval()
        with torch.no_grad():
            for name, weight in stored(base).items():
                plain.get_submodule(name).weight.copy_(weight)
        return plain

    def batch(self, seed: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 128, (8, 16), generator=generator)
        mask = (torch.arange(16) < torch.randint(8, 17, (8, 1), generator=generator)).long()
        labels = ids.masked_fill(mask == 0, -100)
        found = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
        return {key: value.to(self.device) for key, value in found.items()}

    def started(self, method: str, base: nn.Module | None = None) -> PeftModel:
        base = self.quantized() if base is None else base
        return lorainit.get_peft_model(
            base, lora(), method=METHODS[method], data=[self.batch()], progress=False
        )

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        batch = self.batch(9)
        kept = batch["attention_mask"].bool()
        found: Tensor = model.eval()(**batch).logits[kept].float()
        return found


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)


def stored(base: nn.Module) -> dict[str, Tensor]:
    """Every quantized layer's weight as it is stored now, dequantized."""
    from lorainit.adapters.targets import match_targets
    from lorainit.adapters.weights import read_weight

    layers = match_targets(base, lora()).layers
    return {name: read_weight(t.module, name).clone() for name, t in layers.items()}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


# --- the checks: figures, and whether they are as they should be ------------------------------------


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    options = parser.parse_args(arguments)
    good = True
    for record in run(options.bits):
        line = json.dumps(record)
        print(line, flush=True)
        if options.output is not None:
            with options.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        good = good and record["passed"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
