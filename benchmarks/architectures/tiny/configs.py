"""A configuration of any architecture, made tiny: sizes by name, and what a few have to be told."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from benchmarks.architectures.tiny.exceptions import EXCEPTIONS
from benchmarks.architectures.tiny.sizes import ONE_EACH, SIZES, VOCABULARY

_TOKEN = re.compile(r".*(_token_id|_token_index|_token_ids|_id)$|^image_(start|end)_id$")
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_LEFT = frozenset(
    {
        "num_labels",
        "id2label",
        "label2id",
        "torch_dtype",
        "dtype",
        "architectures",
        "transformers_version",
        "problem_type",
        "name_or_path",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "is_decoder",
        "rope_parameters",
        "rope_scaling",
        "layer_types",
        "layers_block_type",
        "mlp_layer_types",
        "indexer_types",
        "hybrid_override_pattern",
        "block_types",
        "layer_type",
        "attention_types",
    }
)
"""What a configuration works out itself, or must keep."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of an architecture, by the name that transformers has for it."""
    if model_type in ("encoder-decoder", "speech-encoder-decoder"):
        return _joined(model_type)
    return tiny(CONFIG_MAPPING[model_type])


def tiny(
    kind: type[PreTrainedConfig],
    instance: PreTrainedConfig | None = None,
    changes: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """A tiny configuration of a class.

    Args:
        kind: the class.
        instance: what it starts from; None: the class's defaults.
        changes: what is set by hand, also in configurations inside, as dictionaries.
    """
    instance = kind() if instance is None else instance
    changes = {**EXCEPTIONS.get(getattr(kind, "model_type", ""), {}), **(changes or {})}
    fields = dict(_fields(kind, instance))
    if None not in (fields.get("kv_lora_rank"), fields.get("num_key_value_heads")):
        changes.setdefault("num_key_value_heads", 4)
    chosen: dict[str, Any] = {}
    token = 3
    for name, value in fields.items():
        if name in _LEFT and name not in changes:
            continue
        if isinstance(value, PreTrainedConfig):
            chosen[name] = tiny(type(value), value, changes.get(name))
        elif name in changes:
            chosen[name] = changes[name]
        elif name in (getattr(kind, "attribute_map", None) or {}) or isinstance(value, bool):
            continue
        elif _is_token(name, value):
            if name in _SPECIAL:
                chosen[name] = _SPECIAL[name]
            elif value >= VOCABULARY - 1:
                chosen[name], token = token, token + 1
        else:
            chosen |= _smaller(name, value)
    inner = {k for k, v in changes.items() if isinstance(v, dict) and k.endswith("_config")}
    return kind(
        **chosen, **{k: v for k, v in changes.items() if k not in chosen and k not in inner}
    )


def _is_token(name: str, value: object) -> bool:
    return isinstance(value, int) and _TOKEN.match(name) is not None and not name.startswith("num")


def _smaller(name: str, value: object) -> dict[str, Any]:
    if isinstance(value, int) and name in SIZES and (value > SIZES[name] or name == "image_size"):
        return {name: SIZES[name]}
    if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
        if name in ONE_EACH:
            return {name: [1] * len(value)}
        if name == "eos_token_id":
            return {name: 2}
        if name == "conv_dim" and len(value) == 7:
            return {name: [32] * 7}
    return {}


def _fields(kind: type[PreTrainedConfig], instance: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    names: list[str] = []
    if dataclasses.is_dataclass(kind):
        names += [field.name for field in dataclasses.fields(kind) if field.init]
    names += [n for n in inspect.signature(kind.__init__).parameters if n not in _NO_FIELDS]
    names += [name for name in vars(instance) if not name.startswith("_")]
    for name in dict.fromkeys(names):
        try:
            value = getattr(instance, name)
        except Exception:
            # An attribute that is worked out of others which are not there.
            continue
        yield name, value


_NO_FIELDS = ("self", "args", "kwargs")


def _joined(model_type: str) -> PreTrainedConfig:
    """An encoder and a decoder of the user's choice."""
    import transformers

    encoder = {"encoder-decoder": "BertConfig", "speech-encoder-decoder": "Wav2Vec2Config"}
    first = tiny(getattr(transformers, encoder[model_type]))
    second = tiny(transformers.BertConfig)
    second.is_decoder = second.add_cross_attention = True
    joined = CONFIG_MAPPING[model_type].from_encoder_decoder_configs(first, second)
    joined.decoder_start_token_id, joined.pad_token_id, joined.vocab_size = 1, 0, VOCABULARY
    return joined
