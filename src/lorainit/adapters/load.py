"""Reading a saved adapter back, anchored ones in the form they are trained in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lorainit.adapters.folder_checks import (
    check_loaded,
    one_error,
    readable_config,
    readable_weights,
)
from lorainit.adapters.install import anchor_loaded, undone_on_error
from lorainit.adapters.origin import SIDE_FILE, Origin, read_origin, remember
from lorainit.adapters.restore import displaced_base_restored_on_error, restored_on_error
from lorainit.errors import AdapterError
from lorainit.models.state import one_at_a_time, unchanged_rng_on_error


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    is_trainable: bool = True,
    anchored: bool | None = None,
    **peft_arguments: Any,
) -> PeftModel:
    """Load a saved LoRA adapter to train it on, without the data or the method that started it.

    Stock PEFT loads the same folder with the same outputs. The difference is what is trained: an
    anchored adapter of rank ``r`` is saved as a plain one of rank ``2r``, of which PEFT would train
    all. Here its frozen half is told from the side file ``lorainit.json`` and frozen again, so the
    parameters are those of the training run, and an optimizer's saved state fits.

    Args:
        model: a base model, or a PeftModel, which gets one more adapter.
        folder: written by ``save_pretrained``, by a Trainer's checkpoint, or by `lorainit.export`.
        adapter_name: the name it gets. In a PeftModel it is not activated: call ``set_adapter``.
        is_trainable: whether it is to be trained.
        anchored: whether the second half of its rank is a frozen start; None: as the side file
            says, or not, where there is no such file.
        **peft_arguments: for ``PeftModel.from_pretrained`` or ``PeftModel.load_adapter``, for
            example ``low_cpu_mem_usage=True``.

    Returns:
        The PeftModel; `model` itself where that was one.

    Raises:
        AdapterError: no LoRA adapter there, one that is damaged or of another base, the name is taken, or
            the side file belongs to another. The model is as it was.
    """
    path = Path(folder)
    with one_error(path):
        config = readable_config(path)
        if isinstance(model, PeftModel) and adapter_name in model.peft_config:
            raise AdapterError(
                f"the model has an adapter '{adapter_name}' already. Give another adapter_name, or "
                "call delete_adapter first."
            )
        keys = readable_weights(path)
        origin = read_origin(path, config) if anchored is None else Origin(anchored)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with (
            one_at_a_time(model),
            unchanged_rng_on_error(device),
            displaced_base_restored_on_error(model, config),
            restored_on_error(model, adapter_name),
            undone_on_error(model, adapter_name),
        ):
            wrapped = _loaded(model, path, adapter_name, is_trainable, peft_arguments)
            check_loaded(path, wrapped, adapter_name, keys)
            if origin is not None:
                if origin.anchored:
                    anchor_loaded(wrapped, adapter_name)
                remember(wrapped, adapter_name, origin)
    return wrapped


def _loaded(
    model: nn.Module,
    path: Path,
    adapter_name: str,
    is_trainable: bool,
    peft_arguments: dict[str, Any],
) -> PeftModel:
    """PEFT's own loading."""
    if isinstance(model, PeftModel):
        model.load_adapter(str(path), adapter_name, is_trainable=is_trainable, **peft_arguments)
        return model
    return PeftModel.from_pretrained(
        model, str(path), adapter_name=adapter_name, is_trainable=is_trainable, **peft_arguments
    )


__all__ = ["SIDE_FILE", "load_adapter"]
