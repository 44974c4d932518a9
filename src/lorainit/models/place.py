"""Where a model is to be had: looked at before anything heavy is imported, and without a hub's retries."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lorainit.errors import DataError, first_line
from lorainit.files.names import is_hub_name

_SECONDS = 5.0
"""For the one question to the hub."""

_MOST_LAYERS = 10_000
"""Above any model's; building more takes for ever before the first weight is missed."""


def check_place(name: str) -> None:
    """Refuse a name that is neither a model's folder nor had from the hub or its cache.

    Raises:
        DataError: with what is there, and what to give.
    """
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise DataError(
                f"'{name}' holds no config.json. Give the folder that the model's save_pretrained "
                "wrote."
            )
        check_layers(name)
    elif os.path.exists(name) or not is_hub_name(name):
        raise DataError(
            f"there is no model folder '{name}'. Give one that save_pretrained wrote, or OWNER/NAME of a model "
            "on the hub (openai-community/gpt2)."
        )
    else:
        _check_hub(name)


def _check_hub(name: str) -> None:
    """One question and no retries; whatever may pass by waiting is left to transformers."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE

    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        url = huggingface_hub.hf_hub_url(name, "config.json")
        huggingface_hub.get_hf_file_metadata(url, timeout=_SECONDS)
    except Exception as error:  # the hub's own, or the HTTP library's, which its versions change
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status == 429 or status >= 500:
            return
        raise DataError(
            f"there is no model folder '{name}', no such model in the cache ({HF_HUB_CACHE}), and the hub gave "
            f"none ({first_line(error)[:160]}). Look at the name and the network; a private model wants 'hf "
            "auth login'. Without a network set HF_HUB_OFFLINE=1, and give a folder or what the cache holds."
        ) from None


def check_layers(name: str) -> None:
    """Refuse a configuration, in a folder, of more layers than any model has.

    Raises:
        DataError: with the number.
    """
    try:
        table = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        # A name on the hub; or transformers says what is wrong.
        return
    for key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        count = table.get(key) if isinstance(table, dict) else None
        if isinstance(count, int | float) and count > _MOST_LAYERS:
            raise DataError(
                f"the config.json in '{name}' asks for {str(count)[:20]} layers ({key}): it is damaged. Give "
                "the folder that the model's save_pretrained wrote."
            )
