"""Saving an adapter so that its folder is the old one, the new one, or plainly not loadable."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel

from lorainit.adapters.card import CARD_FILE, write_card
from lorainit.adapters.serving import CONFIG_FILE, SIDE_FILE, WEIGHTS_FILE
from lorainit.errors import AdapterError
from lorainit.files.folder import replaced_files
from lorainit.parallel import collectives
from lorainit.parallel.partitioned import is_partitioned, whole

_OBSOLETE = (WEIGHTS_FILE, "adapter_model.bin", SIDE_FILE)
"""Files of an adapter that stood there before, where the new one has none of the name."""


def save_adapter(model: PeftModel, folder: str | os.PathLike[str], **peft_arguments: Any) -> None:
    """``model.save_pretrained(folder)``, all files at once.

    PEFT writes the weights first and the configuration afterwards, into the folder itself: a kill or a
    full disk in between leaves new weights with the old configuration. Here everything is written aside,
    and takes its place when it is whole. The files are PEFT's own, the side file, and a model card
    that says how the adapter was started (one that somebody has edited is kept). Of an adapter that
    DeepSpeed's ZeRO-3 has partitioned every process makes the call, and the first one writes.

    Args:
        model: holds the adapters.
        folder: to write to, made if it is not there. Other files in it stay.
        **peft_arguments: for ``PeftModel.save_pretrained``, for example ``selected_adapters``.

    Raises:
        AdapterError: no PeftModel, or `folder` is a file.
        OSError: of the disk's own; what was there before is still there.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError(f"save_adapter wants a PeftModel, not a {type(model).__name__}.")
    own = [p for name, p in model.named_parameters() if "lora_" in name]
    with whole(own):
        if any(map(is_partitioned, own)) and collectives.world()[0] > 0:
            return
        with adapter_files(folder) as aside:
            model.save_pretrained(str(aside), **peft_arguments)
            write_card(model, aside)


@contextlib.contextmanager
def adapter_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder aside, whose files become the adapter in `folder` when the block ends well.

    Raises:
        AdapterError: `folder` is a file.
    """
    path = Path(folder)
    if path.is_file():
        raise AdapterError(f"{path} is a file: give a folder.")
    with replaced_files(path, key=CONFIG_FILE, obsolete=_OBSOLETE) as aside:
        if (path / CARD_FILE).is_file():
            # PEFT adds to a model card that is there.
            shutil.copy2(path / CARD_FILE, aside / CARD_FILE)
        yield aside
