"""What several commands do: read data, a configuration."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch.utils.data import DataLoader

from lorainit.cli.loading import load_tokenizer
from lorainit.data import IGNORED, Records, batches_of, read_records
from lorainit.data.nested import to_device
from lorainit.models.packed_layers import unpacked


@contextlib.contextmanager
def speaking(options: argparse.Namespace) -> Iterator[None]:
    """The package's own log on stderr, and other libraries' chatter off."""
    from transformers.utils import logging as chatter

    logger = logging.getLogger("lorainit")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    with contextlib.ExitStack() as stack:
        # What puts something back is noted before it is changed.
        stack.callback(chatter.set_verbosity, chatter.get_verbosity())
        if chatter.is_progress_bar_enabled():
            stack.callback(chatter.enable_progress_bar)
        chatter.set_verbosity_error()
        chatter.disable_progress_bar()
        stack.callback(logger.setLevel, logger.level)
        stack.callback(logger.removeHandler, handler)
        logger.setLevel(logging.WARNING if options.quiet else logging.INFO)
        logger.addHandler(handler)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def load_records(options: argparse.Namespace, tokenizer: Any = None) -> Records:
    """The data, in the order that the seed gives."""
    tokenizer = load_tokenizer(options) if tokenizer is None else tokenizer
    records = read_records(options.data)
    return Records(records, tokenizer, max_length=options.max_length, seed=options.seed)


def load_data(options: argparse.Namespace) -> DataLoader[Any] | None:
    """Batches of the data, or None where none was given."""
    return batches_of(load_records(options), options.batch_size) if options.data else None


def lora_config(options: argparse.Namespace) -> LoraConfig:
    """The LoraConfig that the options spell."""
    rank = getattr(options, "rank", 16)
    given = getattr(options, "alpha", None)
    alpha = rank if given is None else given
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if math.isfinite(alpha) and float(alpha).is_integer() else alpha,
        use_rslora=getattr(options, "rslora", False),
        lora_dropout=getattr(options, "dropout", 0.0),
        target_modules=modules_of(options.target_modules),
        task_type="CAUSAL_LM",
    )


def modules_of(given: str | Sequence[str]) -> str | list[str]:
    """``all-linear``, a regular expression, or a list of names (with commas between them)."""
    if not isinstance(given, str):
        return list(given)
    names = [name.strip() for name in given.split(",") if name.strip()]
    plain = all(part.replace("_", "").isalnum() for name in names for part in name.split("."))
    return names if names and plain and given != "all-linear" else given


def sample_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments that `collect_statistics` and `get_peft_model` share."""
    return {
        "token_mask": options.token_mask,
        "loss_reduction": options.loss_reduction,
        "max_sequences": options.max_sequences,
        "max_memory": options.max_memory,
        "gradient_dtype": options.gradient_dtype,
        "progress": not options.quiet,
    }


def mean_loss(model: Any, batches: Any) -> float:
    """Mean loss of a label token; infinite where it is not finite."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    model.eval()
    # Packed four-bit layers would pass no gradient on in training.
    with unpacked(model), torch.no_grad():
        for batch in batches:
            labels = int((batch["labels"][:, 1:] != IGNORED).sum())
            if labels:
                total += float(model(**to_device(batch, device)).loss) * labels
                count += labels
    loss = total / count if count else math.nan
    return loss if math.isfinite(loss) else math.inf


def size_in_words(count: float) -> str:
    """Bytes, readable."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
