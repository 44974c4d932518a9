"""Tokens and labels that the model does not know: an index error that names the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.data.batch import Batch
from lorainit.errors import DataError
from lorainit.models.introspection import innermost_model
from lorainit.types import IGNORED


@contextmanager
def tokens_named(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Explain an error inside by a token or a label of `batch` beyond the model's vocabulary, if there is one.

    Asked after an error only: some models have tokens of their own beyond their embedding.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        found = _beyond(model, batch)
        if found is None:
            raise
        raise DataError(
            f"batch {batch.index} has {found}. Encode the data with this model's own tokenizer, or "
            "resize the model's embeddings."
        ) from error


def _beyond(model: nn.Module, batch: Batch) -> str | None:
    base = innermost_model(model)
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    try:
        embedding = base.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    rows = getattr(embedding, "num_embeddings", size)
    for key, value in batch.keywords.items():
        if not isinstance(value, Tensor) or value.is_floating_point() or not value.numel():
            continue
        # Where a device has failed there is nothing more to be read from it.
        if value.is_cuda:
            continue
        least, largest = int(value.min()), int(value.max())
        if key.endswith("input_ids") and isinstance(rows, int):
            if largest >= rows or least < 0:
                odd = largest if largest >= rows else least
                return f"the token {odd} in '{key}', and the model's embedding has {rows} entries"
        elif key == "labels":
            classes = size if value.dim() > 1 else getattr(config, "num_labels", None)
            if isinstance(classes, int) and classes > 1:
                kept = value[value != IGNORED]
                if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < classes:
                    odd = int(kept.max()) if int(kept.max()) >= classes else int(kept.min())
                    return f"the label {odd}, and the model knows {classes}"
    return None
