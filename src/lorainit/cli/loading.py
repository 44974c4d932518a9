"""The model and its tokenizer from a folder or by name: whole, and without code of their own."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from lorainit.errors import DataError
from lorainit.models.pretrained import load_whole


def device_of(options: argparse.Namespace) -> torch.device:
    """The device asked for, or the best there is."""
    if options.device != "auto":
        try:
            device = torch.device(options.device)
            torch.empty(0, device=device)
            if device.type == "meta":
                raise RuntimeError("it holds no numbers")
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
    """The causal language model, on its device, in eval mode.

    Raises:
        DataError: no such model, or its weights are not whole.
    """
    from transformers import AutoModelForCausalLM

    _check_kind(options)
    device = device_of(options)
    dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    model = load_whole(
        AutoModelForCausalLM, options.model, dtype=dtype,
        trust_remote_code=bool(options.trust_remote_code),
    )  # fmt: skip
    if getattr(model, "peft_config", None):
        raise DataError(
            f"'{options.model}' holds an adapter beside the model, which would be loaded with it. Give the "
            "base model's own folder, and the adapter's with --adapter."
        )
    if getattr(model, "hf_device_map", None) is None and not getattr(model, "is_quantized", False):
        model = model.to(device)
    return model.eval()


def load_skeleton(options: argparse.Namespace) -> Any:
    """The same model without its weights: enough to plan with."""
    from transformers import AutoModelForCausalLM

    config = _check_kind(options)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **_trust(options))


def load_tokenizer(options: argparse.Namespace) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(options.model, **_trust(options))
    except Exception as error:  # whatever readers of the many kinds of tokenizers raise
        _refuse_code(options, error)
        if not os.path.isdir(options.model):
            raise
        first = (str(error).strip() or type(error).__name__).split(". ")[0].splitlines()[0]
        raise DataError(
            f"'{options.model}' holds no tokenizer that can be loaded ({first[:120]}). Save the model's "
            "own into that folder: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)."
        ) from None


def _check_kind(options: argparse.Namespace) -> Any:
    """The model's configuration; a causal language model's, or an error."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = options.model
    try:
        config = AutoConfig.from_pretrained(name, **_trust(options))
    except Exception as error:  # configurations check themselves each in its own way
        _refuse_code(options, error)
        if not os.path.isdir(name):
            raise
        first = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"the config.json in '{name}' cannot be read ({first[:200]}). Give the folder that the "
            "model's save_pretrained wrote."
        ) from None
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not own:
        raise DataError(
            f"'{name}' is of type '{config.model_type}', no causal language model, which is what the "
            "commands load. Start it from Python with lorainit.get_peft_model."
        )
    if own and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        _refuse_code(options, None)
    return config


def _trust(options: argparse.Namespace) -> dict[str, bool]:
    """Said either way: transformers asks on the terminal where nothing is said."""
    return {"trust_remote_code": bool(options.trust_remote_code)}


def _refuse_code(options: argparse.Namespace, error: Exception | None) -> None:
    """An error that names the option, where the model comes with code that was not trusted."""
    if options.trust_remote_code or (error and "trust_remote_code" not in str(error)):
        return
    raise DataError(
        f"'{options.model}' comes with Python code of its own, which is not run unasked. Read it, and if you "
        "trust it give --trust-remote-code."
    ) from None
