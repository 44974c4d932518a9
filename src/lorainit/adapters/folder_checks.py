"""A saved adapter's folder, read and checked before the model is touched, and what was loaded of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from lorainit.adapters.config_checks import check_config
from lorainit.adapters.config_file import check_config_file, check_weights_file
from lorainit.adapters.serving import WEIGHTS_FILE
from lorainit.errors import AdapterError, LorainitError, NonFiniteError


@contextlib.contextmanager
def one_error(path: Path) -> Iterator[None]:
    """Whatever PEFT, torch or JSON raise of a damaged folder as one error that names it.

    Raises:
        AdapterError: instead of anything but this package's own errors and a lack of memory.
    """
    try:
        yield
    except (LorainitError, MemoryError, torch.OutOfMemoryError):
        raise
    except (
        AttributeError, ImportError, IndexError, KeyError, OSError, RecursionError, RuntimeError, TypeError,
        ValueError, SafetensorError,
    ) as error:  # fmt: skip
        said = " ".join(str(error).split()) or type(error).__name__
        raise AdapterError(
            f"the adapter in {path} does not fit this model, or is damaged ({said[:200]}). Load the base "
            "model it was trained on, or save the adapter again."
        ) from error


def readable_config(path: Path) -> LoraConfig:
    """The configuration of the adapter in a folder.

    Raises:
        AdapterError, RankError, TargetError: there is none, or it cannot be used.
    """
    check_config_file(path)
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, LoraConfig):
        raise AdapterError(
            f"{path} holds a {type(config).__name__}; lorainit loads LoRA adapters only."
        )
    check_config(config)
    return config


def readable_weights(path: Path) -> frozenset[str]:
    """Names of the tensors of the adapter in a folder, all of which are finite.

    Raises:
        AdapterError: there are none, they are pickled, cut off or damaged.
        NonFiniteError: with the first tensor that holds NaN or infinity.
    """
    check_weights_file(path)
    file = path / WEIGHTS_FILE
    try:
        with safe_open(str(file), framework="pt") as weights:
            names = frozenset(weights.keys())
            for name in sorted(names):
                tensor = weights.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise NonFiniteError(
                        f"'{name}' in {file} has values that are not finite: the training run diverged, or "
                        "the file is damaged. Take an earlier checkpoint."
                    )
    except SafetensorError as error:
        raise AdapterError(
            f"{file} cannot be read ({error}): it is cut off or damaged. Save the adapter again, or copy "
            "it again."
        ) from error
    return names


def check_loaded(path: Path, model: PeftModel, adapter_name: str, keys: frozenset[str]) -> None:
    """Every tensor of the adapter came from its file.

    Raises:
        AdapterError: one did not, so that it would be what PEFT draws at random.
    """
    wanted = get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=False
    )
    missing = sorted(set(wanted) - keys)
    # PEFT translates names of experts from before transformers 5: they differ, and are loaded.
    if missing and not any(".experts." in name or ".block_sparse_moe." in name for name in keys):
        raise AdapterError(
            f"{path / WEIGHTS_FILE} holds no '{missing[0]}' ({len(missing)} of {len(wanted)} tensors are "
            "missing): it is damaged, or of another base model. Save the adapter again."
        )
