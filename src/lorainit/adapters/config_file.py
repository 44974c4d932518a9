"""The files of a saved adapter, looked for before anything heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path

from lorainit.adapters.serving import CONFIG_FILE, WEIGHTS_FILE
from lorainit.errors import AdapterError


def check_config_file(path: Path) -> None:
    """Refuse a folder that holds no readable configuration.

    Raises:
        AdapterError: with the file, and what to give.
    """
    file = path / CONFIG_FILE
    if not file.is_file():
        raise AdapterError(
            f"{path} holds no adapter_config.json. Give the folder that save_pretrained wrote, or "
            "a checkpoint-* folder of a Trainer; an adapter on a model hub must be downloaded first."
        )
    try:
        if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
            raise ValueError("it holds no table")
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{file} is damaged ({str(error)[:120] or type(error).__name__}). Save the adapter again."
        ) from error


def check_weights_file(path: Path) -> None:
    """Refuse a folder that holds no weights, or pickled ones.

    Raises:
        AdapterError: with the file, and what to give.
    """
    if (path / WEIGHTS_FILE).is_file():
        return
    if (path / "adapter_model.bin").is_file():
        raise AdapterError(
            f"the weights in {path} are pickled (adapter_model.bin), and reading a pickle can run code "
            "that is hidden in it. If you trust it, load it with PEFT and save it again."
        )
    raise AdapterError(
        f"{path} holds no {WEIGHTS_FILE}. Give the folder that save_pretrained wrote, complete."
    )
