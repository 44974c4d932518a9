"""A tiny model of an entry, with weights that let every part of it matter, and its rows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.architectures.tiny.configs import tiny_config
from benchmarks.architectures.tiny.families import class_name
from benchmarks.architectures.tiny.senses import image_rows, sound_rows, speech_rows
from benchmarks.architectures.tiny.text import text_rows
from benchmarks.architectures.tiny.vision_language import image_text_rows

Row = dict[str, Any]
CLASSES = 3


def build(family: str, name: str) -> tuple[nn.Module, list[Row]]:
    """A model in eval mode and eight rows, each a batch of one with its labels."""
    kind = getattr(transformers, class_name(family, name))
    torch.manual_seed(0)
    model = kind(_config(family, name, kind)).eval()
    _enliven(model)
    arguments = tuple(inspect.signature(model.forward).parameters)
    return model, rows_for(family, name, model, arguments)


def rows_for(family: str, name: str, model: nn.Module, arguments: tuple[str, ...]) -> list[Row]:
    generator = torch.Generator().manual_seed(5)
    config: Any = model.config
    several = "input_ids" in arguments and "input_features" in arguments
    if family == "IMAGE_TEXT_TO_TEXT" or (
        several
        and family in ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
        and not config.is_encoder_decoder
    ):
        return image_text_rows(model, arguments, generator)
    if family == "IMAGE_CLASSIFICATION":
        return image_rows(name, config, generator)
    if family in ("CTC", "AUDIO_CLASSIFICATION"):
        return sound_rows(name, config, arguments, generator, transcripts=family == "CTC")
    if family == "SPEECH_SEQ_2_SEQ":
        return speech_rows(name, config, arguments, generator)
    return text_rows(family, name, config, arguments, generator, CLASSES)


def _config(family: str, name: str, kind: Any) -> Any:
    config: Any = tiny_config(name)
    class_of = kind.__name__
    if family == "CAUSAL_LM":
        if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
            config.is_decoder = True
        if config.is_encoder_decoder and not class_of.endswith("ConditionalGeneration"):
            config.is_encoder_decoder, config.is_decoder = False, True
        if class_of.startswith("Musicgen"):
            config = config.decoder
        if hasattr(config, "text_config") and not hasattr(kind.config_class, "text_config"):
            config = config.text_config
    if family in ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION"):
        config.num_labels = CLASSES
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 0
    if config.is_encoder_decoder:
        for key, token in (("decoder_start_token_id", 1), ("pad_token_id", 0)):
            if getattr(config, key, None) is None:
                setattr(config, key, token)
    if family == "CTC" and getattr(config, "vocab_size", 1) is None:
        config.vocab_size = 32
    return config


@torch.no_grad()
def _enliven(model: nn.Module) -> None:
    """Weights twice as large; those that begin at zero, or hold whatever was in memory, are drawn."""
    generator = torch.Generator().manual_seed(1)

    def drawn(weight: Tensor) -> Tensor:
        return torch.randn(weight.shape, generator=generator) * 0.05

    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            continue
        zero = float(weight.abs().max()) == 0 if weight.numel() else False
        if not bool(torch.isfinite(weight).all()) or (zero and weight.dim() >= 2):
            weight.copy_(drawn(weight))
        elif zero and ("gate" in name or "alpha" in name):
            weight.add_(0.5)
        elif 2 <= weight.dim() <= 3:
            weight.mul_(2.0)
