"""Reading a saved adapter back, anchored ones in the form they are trained in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from lorainit.adapters.install import anchor_loaded
from lorainit.adapters.origin import SIDE_FILE, Origin, read_origin, remember
from lorainit.errors import AdapterError


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
        AdapterError: no LoRA adapter there, the name is taken, or the side file belongs to another.
    """
    path = Path(folder)
    if not (path / "adapter_config.json").is_file():
        raise AdapterError(
            f"{path} holds no adapter_config.json. Give the folder that save_pretrained wrote, or "
            "a "
            "checkpoint-* folder of a Trainer; an adapter on a model hub must be downloaded first."
        )
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, LoraConfig):
        raise AdapterError(
            f"{path} holds a {type(config).__name__}; lorainit loads LoRA adapters only."
        )
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise AdapterError(
            f"the model has an adapter '{adapter_name}' already. Give another adapter_name, or "
            "call "
            "delete_adapter first."
        )
    origin = read_origin(path, config) if anchored is None else Origin(anchored)
    if isinstance(model, PeftModel):
        wrapped = model
        wrapped.load_adapter(str(path), adapter_name, is_trainable=is_trainable, **peft_arguments)
    else:
        wrapped = PeftModel.from_pretrained(
            model, str(path), adapter_name=adapter_name, is_trainable=is_trainable, **peft_arguments
        )
    if origin is not None:
        if origin.anchored:
            anchor_loaded(wrapped, adapter_name)
        remember(wrapped, adapter_name, origin)
    return wrapped


__all__ = ["SIDE_FILE", "load_adapter"]
