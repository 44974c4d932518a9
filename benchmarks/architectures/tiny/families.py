"""The mappings of transformers that are swept, and their entries."""

from __future__ import annotations

from transformers.models.auto import modeling_auto

FAMILIES = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT",
)


def entries(families: tuple[str, ...] | list[str], names: list[str]) -> list[tuple[str, str]]:
    """Family and model type of every entry; `names` keeps those alone, if there are any."""
    return [
        (family, name)
        for family in families
        for name in getattr(modeling_auto, f"MODEL_FOR_{family}_MAPPING_NAMES")
        if not names or name in names
    ]


def class_name(family: str, name: str) -> str:
    """The model's class; the first where there are several."""
    found = getattr(modeling_auto, f"MODEL_FOR_{family}_MAPPING_NAMES")[name]
    return str(found[0] if isinstance(found, tuple | list) else found)
