"""The model card of a started adapter, in place of PEFT's empty template; a card that was edited is kept."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel

from lorainit.adapters.origin import Origin, origin_of
from lorainit.adapters.serving import CONFIG_FILE

CARD_FILE = "README.md"

_MARK = re.compile(r"<!-- lorainit ([0-9a-f]{64}) -->")
"""The SHA-256 of the card's text, so that an edited one is told apart."""

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def write_card(model: PeftModel, folder: Path) -> None:
    """Describe the start in the card that PEFT has just written, below PEFT's own metadata.

    Nothing is done to a card that somebody has edited, of an adapter that was not started here, or of one
    that PEFT saves in a subfolder.

    Args:
        model: holds the adapter ``default``.
        folder: where ``model.save_pretrained`` has written it.
    """
    file = folder / CARD_FILE
    origin = origin_of(model, "default") if "default" in model.peft_config else None
    if origin is None or not file.is_file() or not (folder / CONFIG_FILE).is_file():
        return
    card = ModelCard.load(file)
    if is_edited(card.text):
        return
    text = "\n".join(_lines(model.peft_config["default"], origin))
    card.text = f"{text}\n\n<!-- lorainit {_digest(text)} -->\n"
    card.save(file)


def is_edited(text: str) -> bool:
    """Whether a card's text, without its metadata, is neither PEFT's template nor as it was written here."""
    mark = _MARK.search(text)
    if mark is not None:
        return _digest(_MARK.sub("", text)) != mark[1]
    template = ModelCard.from_template(ModelCardData()).text
    return _digest(text) != _digest(template)


def _digest(text: str) -> str:
    """Of the words alone, without the versions, to which every save of PEFT's may add its own."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    heading = ("", "### Framework versions")
    own = [line for line in lines if line not in heading and not line.startswith("- PEFT ")]
    return hashlib.sha256("\n".join(own).encode("utf-8", "backslashreplace")).hexdigest()


def _lines(config: LoraConfig, origin: Origin) -> Iterator[str]:
    base = config.base_model_name_or_path or "BASE_MODEL"
    method, settings = _method(origin.settings)
    yield f"# A LoRA adapter, started by lorainit with {method}"
    yield ""
    yield "An ordinary PEFT adapter. `lorainit.json` says how it was started; nothing needs it to load."
    yield ""
    yield f"- **Base model:** `{base}`"
    yield f"- **Start:** {method}" + (f", `{settings}`" if settings else "")
    frozen = ", the second half of which is the frozen start" if origin.anchored else ""
    scaling = ", rsLoRA" if config.use_rslora else ""
    yield f"- **Rank:** {config.r}{frozen}; `lora_alpha={config.lora_alpha}`{scaling}"
    if origin.resized != 1:
        yield (
            f"- **Resized for its learning rate:** factors times {origin.resized:.3g}; "
            f"`lora_alpha` was {config.lora_alpha * origin.resized**2:.4g}"
        )
    if config.rank_pattern:
        yield f"- **Other ranks:** of {len(config.rank_pattern)} layers, in `adapter_config.json`"
    yield f"- **Target modules:** {_targets(config)}"
    yield from _measured(origin.measured)
    auto = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel")
    yield from (
        "", "## How to load it", "", "```python", "from peft import PeftModel",
        f"from transformers import {auto}", "", f'base = {auto}.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, "ADAPTER_FOLDER")', "```", "",
    )  # fmt: skip
    why = ", which freezes the start again" if origin.anchored else ""
    yield f'To train it on: `lorainit.load_adapter(base, "ADAPTER_FOLDER")`{why}.'
    yield from (
        "", "### Framework versions", "", f"- PEFT {peft.__version__}", f"- lorainit {origin.version}",
    )  # fmt: skip


def _method(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Its name, and its settings as a call has them."""
    given = dict(settings)
    name = str(given.pop("method", "a method"))
    parts = []
    for key, value in given.items():
        if isinstance(value, Mapping):
            inner, words = _method(value)
            parts.append(f"{key}={inner}({words})")
        else:
            parts.append(f"{key}={value!r}")
    return name, ", ".join(parts)


def _targets(config: LoraConfig) -> str:
    targets = config.target_modules or config.target_parameters or ()
    if isinstance(targets, str):
        return f"`{targets}`"
    ends = sorted({name.rpartition(".")[2] for name in targets})
    names = [f"`{name}`" for name in (ends if len(ends) < len(targets) else sorted(targets))]
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"{shown}: {len(targets)} layers" if len(ends) < len(targets) else shown


def _measured(measured: Mapping[str, Any]) -> Iterator[str]:
    """What was read, losses and rate, where they were measured."""
    if "statistics_sequences" in measured:
        yield f"- **Statistics:** of {measured['statistics_sequences']:.0f} sequences"
    elif "data_sequences" in measured:
        held = measured.get("sequences", 0.0)
        more = f", beside {held:.0f} that were held back" if held else ""
        yield f"- **Statistics:** of {measured['data_sequences'] - held:.0f} sequences{more}"
    if "start_loss" in measured:
        count = f" on {measured['sequences']:.0f} sequences" if "sequences" in measured else ""
        line = (
            f"- **Held-back loss{count}:** {measured['base_loss']:.4g} of the base model, "
            f"{measured['start_loss']:.4g} at the start"
        )
        if "refused_loss" in measured:
            line += f" (plain LoRA: the measured start had {measured['refused_loss']:.4g})"
        yield line
    if "learning_rate" in measured:
        low, high = (measured.get(f"learning_rate_{end}") for end in ("low", "high"))
        around = f" ({low:.2g} to {high:.2g})" if low is not None and high is not None else ""
        yield f"- **Suggested learning rate:** {measured['learning_rate']:.2g}{around}"
