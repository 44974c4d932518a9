"""What several commands do: load a model and its tokenizer, read a method and its settings."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from lorainit.data import IGNORED, Records, batches_of, read_records
from lorainit.data.nested import to_device
from lorainit.errors import DataError
from lorainit.methods import METHODS
from lorainit.types import Method


@contextlib.contextmanager
def speaking(options: argparse.Namespace) -> Iterator[None]:
    """The package's own log on stderr, and other libraries' chatter off."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger("lorainit")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level
    logger.setLevel(logging.WARNING if options.quiet else logging.INFO)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def device_of(options: argparse.Namespace) -> torch.device:
    """The device asked for, or the best there is."""
    if options.device != "auto":
        try:
            device = torch.device(options.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            first = str(error).splitlines()[0]
            raise ValueError(
                f"--device {options.device} cannot be used ({first}). Give cpu, or leave it out."
            ) from None
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_model(options: argparse.Namespace) -> Any:
    """The causal language model, on its device, in eval mode."""
    from transformers import AutoModelForCausalLM

    _check_kind(options.model)
    device = device_of(options)
    dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    except SafetensorError as error:
        raise DataError(
            f"the weights in '{options.model}' cannot be read ({error}). The file is damaged or "
            "cut off: copy or download the model again."
        ) from None
    if getattr(model, "hf_device_map", None) is None and not getattr(model, "is_quantized", False):
        model = model.to(device)
    return model.eval()


def load_skeleton(options: argparse.Namespace) -> Any:
    """The same model without its weights: enough to plan with."""
    from transformers import AutoModelForCausalLM

    config = _check_kind(options.model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_tokenizer(options: argparse.Namespace) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    _check_folder(options.model)
    try:
        return AutoTokenizer.from_pretrained(options.model)
    except Exception as error:  # whatever readers of the many kinds of tokenizers raise
        if not os.path.isdir(options.model):
            raise
        first = (str(error).strip() or type(error).__name__).split(". ")[0].splitlines()[0]
        raise DataError(
            f"'{options.model}' holds no tokenizer that can be loaded ({first[:120]}). Save the model's "
            "own into that folder: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)."
        ) from None


def _check_kind(name: str) -> Any:
    """The model's configuration; a causal language model's, or an error."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    _check_folder(name)
    config = AutoConfig.from_pretrained(name)
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not known and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise DataError(
            f"'{name}' is of type '{config.model_type}', no causal language model, which is what the "
            "commands load. Start it from Python with lorainit.get_peft_model."
        )
    return config


def _check_folder(name: str) -> None:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep != "/"
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise DataError(
                f"'{name}' holds no config.json. Give the folder that the model's save_pretrained "
                "wrote."
            )
    elif looks_local or os.path.exists(name):
        raise DataError(f"there is no model folder '{name}'. Give one that save_pretrained wrote.")


def load_records(options: argparse.Namespace, tokenizer: Any = None) -> Records:
    """The data, in the order that the seed gives."""
    tokenizer = load_tokenizer(options) if tokenizer is None else tokenizer
    records = read_records(options.data)
    return Records(records, tokenizer, max_length=options.max_length, seed=options.seed)


def load_data(options: argparse.Namespace) -> DataLoader[Any] | None:
    """Batches of the data, or None where none was given."""
    return batches_of(load_records(options), options.batch_size) if options.data else None


def lora_config(options: argparse.Namespace) -> LoraConfig:
    """The LoraConfig that the options spell."""
    rank = getattr(options, "rank", 16)
    alpha = getattr(options, "alpha", None) or rank
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        use_rslora=getattr(options, "rslora", False),
        lora_dropout=getattr(options, "dropout", 0.0),
        target_modules=modules_of(options.target_modules),
        task_type="CAUSAL_LM",
    )


def modules_of(given: str | Sequence[str]) -> str | list[str]:
    """``all-linear``, a regular expression, or a list of names (with commas between them)."""
    if not isinstance(given, str):
        return list(given)
    names = [name.strip() for name in given.split(",") if name.strip()]
    plain = all(part.replace("_", "").isalnum() for name in names for part in name.split("."))
    return names if names and plain and given != "all-linear" else given


def known_methods(names: Sequence[str]) -> list[str]:
    """The names of methods, each known, at least one.

    Raises:
        ValueError: there is no method of that name.
    """
    for name in names or [""]:
        class_of(name)
    return list(names)


def class_of(name: str) -> Any:
    """The class of a method by its name."""
    if name not in METHODS:
        raise ValueError(f"there is no method '{name}'. There are: {', '.join(METHODS)}.")
    return METHODS[name]


def method_of(options: argparse.Namespace) -> Method:
    """The method, with the settings given."""
    kind = class_of(options.method)
    base = kind.paper() if options.paper else kind()
    known = {field.name for field in dataclasses.fields(kind)}
    changes: dict[str, object] = {}
    for name, value in (options.set or {}).items():
        if name not in known:
            there = ", ".join(field.name for field in dataclasses.fields(kind)) or "none"
            raise ValueError(
                f"--set {name}={value}: write NAME=VALUE; the settings of {options.method} are: "
                f"{there}."
            )
        changes[name] = _value(value) if isinstance(value, str) else value
    method: Method = dataclasses.replace(base, **changes)
    return method


def _value(text: str) -> object:
    lowered = {"true": True, "false": False, "none": None}
    if text.lower() in lowered:
        return lowered[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def sample_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments that `collect_statistics` and `get_peft_model` share."""
    return {
        "token_mask": options.token_mask,
        "loss_reduction": options.loss_reduction,
        "max_sequences": options.max_sequences,
        "max_memory": options.max_memory,
        "gradient_dtype": options.gradient_dtype,
        "progress": not options.quiet,
    }


def mean_loss(model: Any, batches: Any) -> float:
    """Mean loss of a label token; infinite where it is not finite."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        for batch in batches:
            labels = int((batch["labels"][:, 1:] != IGNORED).sum())
            if labels:
                total += float(model(**to_device(batch, device)).loss) * labels
                count += labels
    loss = total / count if count else math.nan
    return loss if math.isfinite(loss) else math.inf


def check_file(output: str) -> None:
    """A file that cannot be written is found out before the work, not after."""
    path = Path(output)
    if path.is_dir():
        raise OSError(f"--output {output} cannot be written: it is a folder. Give a file's name.")
    _check_writable(path.parent, output)


def check_folder(output: str) -> None:
    """The same of an adapter's folder, and that nothing but an adapter would be written over."""
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise OSError(f"--output {output} cannot be written: it is a file. Give a folder.")
    there = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if there and "adapter_config.json" not in there:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        raise OSError(
            f"--output {output} holds other things than an adapter ({', '.join(there[:3])}{more}). "
            "Give a new or an empty folder."
        )
    _check_writable(path if path.exists() else path.parent, output)


def _check_writable(folder: Path, output: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{Path(output).name}.lorainit-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"--output {output} cannot be written ({error.strerror}). Give another place."
        ) from None


def size_in_words(count: float) -> str:
    """Bytes, readable."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
