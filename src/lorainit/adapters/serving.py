"""What servers may object to in an adapter folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
SIDE_FILE = "lorainit.json"
PREFIX = "base_model.model."
"""Of every tensor's name in the weights file."""

_NEUTRAL: dict[str, object] = {
    "bias": "none",
    "modules_to_save": None,
    "use_dora": False,
    "lora_bias": False,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_bdlora": None,
    "use_qalora": False,
    "target_parameters": None,
    "trainable_token_indices": None,
}


def serving_objections(folder: str | os.PathLike[str], *, max_rank: int | None = None) -> list[str]:
    """Why servers might refuse an adapter folder; the checks that vLLM's loader makes, and more.

    Args:
        folder: a saved adapter.
        max_rank: the server's limit on the rank, if known.

    Returns:
        One sentence for each objection; empty for a plain LoRA adapter.
    """
    path = Path(folder)
    config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    found = [
        f"{key}={config[key]!r} is not served by vLLM."
        for key, neutral in _NEUTRAL.items()
        if key in config and config[key] not in (neutral, None, [], {}, False)
    ]
    if isinstance(config.get("init_lora_weights"), str):
        found.append(
            f"init_lora_weights={config['init_lora_weights']!r} makes loaders change the base "
            "weights."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            found.append(
                f"{key} is not empty: many servers ignore it and scale these layers wrongly."
            )
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    if max_rank is not None and max(ranks) > max_rank:
        found.append(
            f"rank {max(ranks)} is above the limit of {max_rank}; export with rank={max_rank}."
        )
    found += _odd_names(path)
    return found


def _odd_names(path: Path) -> list[str]:
    from safetensors import safe_open

    if not (path / WEIGHTS_FILE).is_file():
        return [f"there is no {WEIGHTS_FILE}."]
    with safe_open(str(path / WEIGHTS_FILE), framework="pt") as file:
        keys = list(file.keys())
        odd = [
            key
            for key in keys
            if not (key.startswith(PREFIX) and key.endswith((".lora_A.weight", ".lora_B.weight")))
        ]
        kernels = [
            key for key in keys if key not in odd and len(file.get_slice(key).get_shape()) > 2
        ]
    found = []
    if odd:
        found = [
            f"{len(odd)} tensors are no lora_A or lora_B of a linear layer, such as '{odd[0]}'."
        ]
    if kernels:
        found.append(f"{len(kernels)} tensors are kernels of convolutions, such as '{kernels[0]}'.")
    return found
