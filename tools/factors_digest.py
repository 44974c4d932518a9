"""Digests of every method's factors on four small models, to compare two commits to the bit.

``PYTHONPATH=src python tools/factors_digest.py OUT.json`` writes one entry a model, method and layer;
``python tools/factors_digest.py --compare A.json B.json`` prints what differs, and exits 1 if anything does.
Only public names are used, so that the script runs on older commits too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from peft import LoraConfig
from torch import Tensor, nn

import lorainit
from lorainit.methods import METHODS

VOCABULARY = 64
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def llama() -> Any:
    """Two layers with grouped-query attention."""
    return t.LlamaForCausalLM(t.LlamaConfig(**SHARED, num_key_value_heads=2))


def bert() -> Any:
    """A sequence classifier of three classes."""
    return t.BertForSequenceClassification(t.BertConfig(**SHARED, num_labels=3))


def mixture() -> Any:
    """Four fused experts, two a token."""
    return t.MixtralForCausalLM(
        t.MixtralConfig(**SHARED, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    )


def quantized() -> Any:
    """The Llama with its projections in eight bits."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = llama()
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda m, name: isinstance(m, nn.Linear) and "lm_head" not in name,
    )
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "bert": bert,
    "mixture": mixture,
    "quantized": quantized,
}


def batches(kind: str) -> list[dict[str, Tensor]]:
    """Eight ragged batches of six rows, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(8):
        ids = torch.randint(1, VOCABULARY, (6, 12), generator=generator)
        lengths = torch.randint(5, 13, (6, 1), generator=generator)
        mask = (torch.arange(12) < lengths).long()
        labels = (ids * mask).masked_fill(mask == 0, -100)
        if kind == "bert":
            labels = torch.randint(0, 3, (6,), generator=generator)
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return found


def digest(tensor: Tensor) -> str:
    """Of its dtype, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    return hashlib.sha256(head + plain.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def starts() -> dict[str, Callable[[], Any]]:
    """Every method of the table by its name, and a few settings that take other ways."""
    named: dict[str, Callable[[], Any]] = dict(METHODS)
    named["natural-3-steps"] = lambda: lorainit.Natural(steps=3)
    named["natural-redistributed"] = lambda: lorainit.Natural(rho=2.0)
    named["natural-length"] = lambda: lorainit.Natural(length=0.01)
    named["lora-da-calibrated"] = lambda: lorainit.LoraDA(scale="calibrated")
    named["lora-da-paper"] = lorainit.LoraDA.paper
    named["auto-refuses"] = lambda: lorainit.Auto(least_gain=0.99)
    named["vanilla-2"] = lambda: lorainit.Vanilla(size=2.0)
    return named


def measure() -> dict[str, dict[str, str]]:
    """Digests by model and method: factors, and the first logits after them."""
    found: dict[str, dict[str, str]] = {}
    for kind, build in MODELS.items():
        data = batches(kind)
        for name, make in starts().items():
            torch.manual_seed(0)
            model = build().eval()
            config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
            if kind == "mixture":
                config.target_modules = {"q_proj", "k_proj", "v_proj", "o_proj"}
                config.target_parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
            if kind == "bert":
                config.target_modules = {"query", "key", "value", "dense"}
                config.exclude_modules = ".*pooler.*"
            entries: dict[str, str] = {}
            try:
                wrapped = lorainit.get_peft_model(
                    model, config, method=make(), data=data, progress=False, cap_rank=True
                )
                for key, tensor in sorted(wrapped.state_dict().items()):
                    if "lora_" in key:
                        entries[key] = digest(tensor)
                with torch.no_grad():
                    entries["logits"] = digest(wrapped(**data[0]).logits)
            except lorainit.errors.LorainitError as error:
                entries["error"] = f"{type(error).__name__}: {error}"
            found[f"{kind}/{name}"] = entries
            print(f"{kind}/{name}: {entries.get('error', len(entries))}", file=sys.stderr)
        needs = lorainit.Natural().needs | {"input_mean"}
        torch.manual_seed(0)
        statistics = lorainit.collect_statistics(
            build().eval(), config, data=data, needs=needs, progress=False
        )
        found[f"{kind}/statistics"] = {
            f"{layer}/{field}": digest(tensor)
            for layer in statistics
            for field in lorainit.LayerStatistics.TENSORS
            if (tensor := getattr(statistics[layer], field)) is not None
        }
    return found


def compare(first: Path, second: Path) -> int:
    """Print what differs; the number of entries that do."""
    old, new = (json.loads(path.read_text()) for path in (first, second))
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    for key in differing:
        a, b = old.get(key, {}), new.get(key, {})
        where = [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
        print(f"{key}: {len(where)} of {len({*a, *b})} differ, first {where[0] if where else '-'}")
    entries = sum(map(len, old.values()))
    print(f"{len(old)} starts, {entries} tensors: {len(differing)} starts differ")
    return len(differing)


def main() -> None:
    """Measure, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args()
    if options.compare:
        sys.exit(min(1, compare(*options.paths)))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    text = json.dumps(measure(), indent=0, sort_keys=True)
    options.paths[0].write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
