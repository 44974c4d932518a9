"""Tiny models whose loss, masks or padding are not those of a plain causal language model.

Each with single rows that its own forward takes; `together` pads them to one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 60
LENGTHS = (9, 7, 6, 8)
Row = dict[str, Tensor]

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Kind:
    """An architecture of one kind.

    Attributes:
        build: makes the model.
        rows: single examples, not padded.
        own: whether its own loss is not the default one.
        batched: whether the model gives a padded row what it gives the row alone.
        pads_to: the length that the model itself pads its inputs to, where it does.
        warns: whether some inputs are neither rows of positions nor vectors of rows, which is said.
    """

    build: Callable[[], nn.Module]
    rows: Callable[[], list[Row]]
    own: bool = False
    batched: bool = True
    pads_to: int | None = None
    warns: bool = False


def made(build: Callable[[], nn.Module]) -> Any:
    """The model with weights of its own seed, large enough to tell positions apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
    return model


def together(rows: Sequence[Row]) -> Row:
    """One batch: second dimensions padded at the end, labels with -100, all else with zeros."""
    batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if values[0].dim() < 2 or len({v.shape[1:] for v in values}) == 1:
            batch[key] = torch.cat(values)
            continue
        length = max(v.shape[1] for v in values)
        fill = -100 if key == "labels" else 0
        padding = [(v.dim() - 2) * [0, 0] + [0, length - v.shape[1]] for v in values]
        parts = [nn.functional.pad(v, p, value=fill) for v, p in zip(values, padding, strict=True)]
        batch[key] = torch.cat(parts)
    return batch


def _ids() -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in LENGTHS:
        ids = torch.randint(5, VOCABULARY, (1, length), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return found


def causal() -> list[Row]:
    """Every token a label, but a first one of some."""
    rows = _ids()
    for i, row in enumerate(rows):
        row["labels"] = row["input_ids"].clone()
        row["labels"][:, : i % 3] = -100
    return rows


def spans() -> list[Row]:
    """An answer's first and last token."""
    return [
        row | {"start_positions": torch.tensor([1 + i % 2]), "end_positions": torch.tensor([3])}
        for i, row in enumerate(_ids())
    ]


def classes() -> list[Row]:
    """One label a row, whose last token is the end."""
    rows = _ids()
    for i, row in enumerate(rows):
        row["input_ids"][:, -1] = 2
        row["labels"] = torch.tensor([i % 3])
    return rows


def tags() -> list[Row]:
    """A label beside every token."""
    return [row | {"labels": row["input_ids"] % 3} for row in _ids()]


def targets() -> list[Row]:
    """Other tokens as labels, of other lengths."""
    generator = torch.Generator().manual_seed(2)
    return [
        row | {"labels": torch.randint(5, VOCABULARY, (1, n), generator=generator)}
        for row, n in zip(_ids(), (5, 4, 6, 3), strict=True)
    ]


def given_targets() -> list[Row]:
    """The same with decoder inputs, for a model that makes none of labels."""
    rows = targets()
    for row in rows:
        start = torch.full((1, 1), 2)
        row["decoder_input_ids"] = torch.cat([start, row["labels"][:, :-1]], 1)
    return rows


def spoken() -> list[Row]:
    """Frames of sound, and fewer labels than the encoder makes steps."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for frames, labels in ((60, 3), (48, 2), (72, 4), (40, 2)):
        values = torch.randn(1, frames, 16, generator=generator)
        wanted = torch.randint(1, 20, (1, labels), generator=generator)
        mask = torch.ones(1, frames, dtype=torch.long)
        found.append({"input_features": values, "attention_mask": mask, "labels": wanted})
    return found


def transcripts() -> list[Row]:
    """Samples of sound, and fewer labels than frames."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for samples, labels in ((120, 3), (100, 2), (140, 4), (90, 2)):
        values = torch.randn(1, samples, generator=generator)
        wanted = torch.randint(1, 20, (1, labels), generator=generator)
        mask = torch.ones(1, samples, dtype=torch.long)
        found.append({"input_values": values, "attention_mask": mask, "labels": wanted})
    return found


def images_in_text() -> list[Row]:
    """An image's tokens inside of a text; the longest text has as many tokens as the image patches."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for length in (16, 12, 10, 14):
        ids = torch.randint(5, VOCABULARY - 2, (1, length), generator=generator)
        ids[:, 1:5] = VOCABULARY - 1
        labels = ids.masked_fill(ids == VOCABULARY - 1, -100)
        pixels = torch.randn(1, 3, 16, 16, generator=generator)
        types = (ids == VOCABULARY - 1).long()
        found.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "token_type_ids": types,
                "pixel_values": pixels,
                "labels": labels,
            }
        )
    return found


def gemma3() -> nn.Module:
    """Sixteen patches an image, of which four tokens are made."""
    text = hf.Gemma3TextConfig(**_SIZES, num_key_value_heads=1, head_dim=8, sliding_window=32)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
    }
    config = hf.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
        image_token_id=VOCABULARY - 1,
    )
    model = hf.Gemma3ForConditionalGeneration(config)
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    return model


def longformer(head: str) -> nn.Module:
    config = hf.LongformerConfig(**_SIZES, attention_window=32, num_labels=3, pad_token_id=0)
    return getattr(hf, f"LongformerFor{head}")(config)  # type: ignore[no-any-return]


def led() -> nn.Module:
    sizes = {k: v for k, v in _BART.items() if k != "max_position_embeddings"}
    return hf.LEDForConditionalGeneration(
        hf.LEDConfig(
            **sizes,
            attention_window=32,
            max_encoder_position_embeddings=128,
            max_decoder_position_embeddings=128,
        )
    )


def pegasus_x() -> nn.Module:
    return hf.PegasusXForConditionalGeneration(
        hf.PegasusXConfig(**_BART, block_size=16, num_global_tokens=3, stagger_local_blocks=False)
    )


def fsmt() -> nn.Module:
    """Its encoder and decoder are no models by themselves, and have the length first."""
    return hf.FSMTForConditionalGeneration(
        hf.FSMTConfig(
            langs=["en", "de"],
            src_vocab_size=VOCABULARY,
            tgt_vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    )


def parakeet() -> nn.Module:
    """An encoder that makes one step of eight frames."""
    encoder = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_mel_bins": 16,
        "subsampling_conv_channels": 8,
        "conv_kernel_size": 3,
    }
    return hf.ParakeetForCTC(
        hf.ParakeetCTCConfig(
            vocab_size=20, encoder_config=encoder, pad_token_id=0, ctc_zero_infinity=True
        )
    )


def ctc() -> nn.Module:
    return hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            conv_dim=(8, 8),
            conv_kernel=(4, 2),
            conv_stride=(3, 2),
            num_feat_extract_layers=2,
            feat_extract_norm="layer",
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            ctc_loss_reduction="sum",
            ctc_zero_infinity=True,
            apply_spec_augment=False,
        )
    )


def _decoder(**more: Any) -> dict[str, Any]:
    return (
        _BART
        | {"is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False}
        | more
    )


KINDS: dict[str, Kind] = {
    "llama": Kind(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES)), causal),
    "bert tags": Kind(
        lambda: hf.BertForTokenClassification(hf.BertConfig(**_SIZES, num_labels=3)), tags
    ),
    "bart, causal": Kind(lambda: hf.BartForCausalLM(hf.BartConfig(**_decoder())), causal, own=True),
    "marian, causal": Kind(
        lambda: hf.MarianForCausalLM(hf.MarianConfig(**_decoder(decoder_vocab_size=VOCABULARY))),
        causal,
        own=True,
    ),
    "xlnet": Kind(
        lambda: hf.XLNetLMHeadModel(
            hf.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=24)
        ),
        causal,
        own=True,
    ),
    "prophetnet": Kind(
        lambda: hf.ProphetNetForConditionalGeneration(
            hf.ProphetNetConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                num_encoder_layers=1,
                num_decoder_layers=1,
                num_encoder_attention_heads=2,
                num_decoder_attention_heads=2,
                max_position_embeddings=64,
                decoder_start_token_id=2,
                pad_token_id=0,
            )
        ),
        targets,
        own=True,
        # Its own relative positions depend on the padding.
        batched=False,
    ),
    "bert spans": Kind(
        lambda: hf.BertForQuestionAnswering(hf.BertConfig(**_SIZES)),
        spans,
        own=True,
        # Its softmax is over padding, too.
        batched=False,
    ),
    "wav2vec2, transcripts": Kind(ctc, transcripts, own=True),
    "mixtral, router losses": Kind(
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(
                **_SIZES,
                num_key_value_heads=1,
                num_local_experts=2,
                num_experts_per_tok=1,
                output_router_logits=True,
                router_aux_loss_coef=0.5,
            )
        ),
        causal,
        own=True,
    ),
    "bart classes": Kind(
        lambda: hf.BartForSequenceClassification(hf.BartConfig(**_BART, num_labels=3)), classes
    ),
    "t5 classes": Kind(
        lambda: hf.T5ForSequenceClassification(hf.T5Config(**_T5, num_labels=3)), classes
    ),
    "t5": Kind(lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)), targets),
    "longformer tags": Kind(lambda: longformer("TokenClassification"), tags, pads_to=32),
    "led": Kind(led, targets, pads_to=32),
    # Some of its layers read global tokens, too.
    "pegasus_x": Kind(pegasus_x, targets, pads_to=16),
    "fsmt": Kind(fsmt, given_targets),
    "gemma3": Kind(gemma3, images_in_text),
}
