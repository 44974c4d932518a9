"""Every field of PEFT's LoraConfig, and what a start of this package does about it.

A field is either honoured, has no say in a start, or is refused before any work, with the remedy. A field that
is in no table comes from a PEFT that is newer than this package: it is refused where it is set.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from peft import LoraConfig, PeftType

from lorainit.errors import AdapterError

HONOURED = {
    "r": "the rank",
    "lora_alpha": "the scaling",
    "use_rslora": "the scaling",
    "rank_pattern": "ranks of single layers",
    "alpha_pattern": "scalings of single layers; they survive capped and redistributed ranks",
    "target_modules": "which layers are started; what cannot be served keeps PEFT's start, and it is said",
    "exclude_modules": "which layers are not",
    "layers_to_transform": "which layers are started",
    "layers_pattern": "which layers are started",
    "target_parameters": "experts of stacked parameters are started each",
    "fan_in_fan_out": "as in PEFT",
    "lora_dropout": "both halves of an anchored factor see one mask",
    "bias": "as in PEFT",
    "lora_bias": "as in PEFT; it starts at zero",
    "use_dora": "magnitudes are taken again of the started weight",
    "alora_invocation_tokens": "the adapter is started as any other; statistics are of all positions",
    "modules_to_save": "as in PEFT",
    "trainable_token_indices": "as in PEFT",
    "ensure_weight_tying": "as in PEFT; refused where two tied layers are both targets",
    "runtime_config": "as in PEFT",
}

WITHOUT_A_SAY = {
    "init_lora_weights": "the method decides the start; saved as True",
    "eva_config": "of init_lora_weights='eva'",
    "corda_config": "of init_lora_weights='corda'",
    "lora_ga_config": "of init_lora_weights='lora_ga'",
    "loftq_config": "of init_lora_weights='loftq'",
    "qalora_group_size": "of use_qalora",
    "task_type": "PEFT's own",
    "peft_type": "PEFT's own",
    "auto_mapping": "PEFT's own",
    "peft_version": "PEFT's own",
    "base_model_name_or_path": "PEFT's own",
    "revision": "PEFT's own",
    "inference_mode": "PEFT's own",
}

_OF_A_START = ("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config")

_FACTORS = "its factors are no plain pair of matrices that a start could be written into"

REFUSED = {
    "layer_replication": (
        "it adapts every copy of a layer by itself, and the copies share what statistics are collected of. "
        "Replicate the layers first, save that model, and start an adapter of it"
    ),
    "use_qalora": f"its A is for groups of inputs, so {_FACTORS}. Leave it out",
    "use_bdlora": f"its factors are block-diagonal, so {_FACTORS}. Leave it out",
    "kasa_config": (
        "KaSA overwrites the weights of the base model, which a start never does. Leave it out, or use "
        "peft.get_peft_model"
    ),
    "monteclora_config": (
        "MonteCLoRA samples its factors at every step, around values that a start does not know. Leave it "
        "out, or use peft.get_peft_model"
    ),
    "velora_config": (
        "VeLoRA's own backward pass takes A for one matrix that is all trained. Leave it out, or use "
        "peft.get_peft_model"
    ),
    "arrow_config": (
        "Arrow routes between adapters that are trained already, so there is nothing to start. Start and "
        "train them first, then call peft.tuners.lora.create_arrow_model"
    ),
    "megatron_config": "layers of Megatron-LM are not served. Use peft.get_peft_model",
    "megatron_core": "layers of Megatron-LM are not served. Use peft.get_peft_model",
}


def check_supported(config: LoraConfig) -> None:
    """Refuse what a start does not serve.

    Raises:
        AdapterError: a configuration of another kind of adapter, or a field that is not served.
    """
    if config.peft_type != PeftType.LORA:
        raise AdapterError(
            f"a {type(config).__name__} makes another kind of adapter than LoRA, with factors of its own. "
            "Give a peft.LoraConfig."
        )
    for field in fields(config):
        if not _is_set(field, getattr(config, field.name, None)):
            continue
        if field.name in REFUSED:
            raise AdapterError(
                f"LoraConfig({field.name}=...) is not served: {REFUSED[field.name]}."
            )
        known = field.name in HONOURED or field.name in WITHOUT_A_SAY
        if not known and field.name in {f.name for f in fields(LoraConfig)}:
            raise AdapterError(
                f"LoraConfig({field.name}=...) is not known to this version of lorainit, which may be older "
                "than the installed PEFT. Leave it out, or use peft.get_peft_model."
            )


def starts_asked_for(config: LoraConfig) -> list[str]:
    """Fields that are set and choose a start of PEFT's, where the method has the say."""
    known = {field.name: field for field in fields(config)}
    return [
        name
        for name in _OF_A_START
        if name in known and _is_set(known[name], getattr(config, name))
    ]


def _is_set(field: Field[Any], value: Any) -> bool:
    default = field.default
    if default is MISSING:
        default = None if field.default_factory is MISSING else field.default_factory()
    return bool(value != default and (value or default))
