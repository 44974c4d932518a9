"""A saved adapter on stock PEFT, in a process of its own that never imports lorainit.

``python -m benchmarks.demo.reload BASE ADAPTER PROBE`` loads the base model from the folder
``BASE`` and the adapter from the folder ``ADAPTER``, runs the prompts of the safetensors file
``PROBE`` and prints, as one line of JSON, how far the logits are from those of the live model.
"""

from __future__ import annotations

import json
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def compare(base: str, adapter: str, probe: str) -> dict[str, object]:
    """Largest differences of the logits over all attended positions of the probe's prompts."""
    expected = load_file(probe)
    model, found = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, output_loading_info=True
    )
    if any(found.values()):
        raise SystemExit(f"the base model in {base} is not whole: {found}")
    model = PeftModel.from_pretrained(model.eval(), adapter).eval()
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask")}
    attended = inputs["attention_mask"].bool()
    got, want = model(**inputs).logits[attended], expected["logits"][attended]
    return {
        "max_abs_diff": (got - want).abs().max().item(),
        "max_abs_logit": want.abs().max().item(),
        "same_argmax": (got.argmax(-1) == want.argmax(-1)).double().mean().item(),
        "positions": int(attended.sum()),
        "rank": model.peft_config["default"].r,
        "lorainit_imported": any(name.split(".")[0] == "lorainit" for name in sys.modules),
    }


def main() -> None:
    result = compare(*sys.argv[1:4])
    assert "lorainit" not in sys.modules, "stock PEFT must be enough to load the adapter"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
