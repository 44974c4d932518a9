"""Where an adapter came from, carried by its configuration and written beside it.

PEFT writes one configuration for every adapter that it saves, whoever asks: `save_pretrained`, a
Trainer's checkpoint, an upload. So the configuration is the place from which a small side file is
written too. Nothing reads it but `lorainit.load_adapter`, and an adapter without it is as good.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel

from lorainit._version import __version__
from lorainit.errors import AdapterError
from lorainit.files.atomic import write_text

SIDE_FILE = "lorainit.json"
_FORMAT = 1


@dataclass(frozen=True)
class Origin:
    """How an adapter was started.

    Attributes:
        anchored: the second half of every factor's rank is the frozen start.
        settings: the method's name and settings, JSON-ready.
        version: of this package.
        measured: where the length was measured: ``base_loss``, ``start_loss``, on the sequences held
            back, and the ``length``; where plain LoRA was taken in place of the start that was measured,
            that one's loss as ``refused_loss``.
    """

    anchored: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__
    measured: Mapping[str, float] = field(default_factory=dict)


class StartedLoraConfig(LoraConfig):  # type: ignore[misc]
    """A LoraConfig that remembers how its adapter was started; the same fields, the same file."""

    origin: Origin | None = None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` as PEFT does, and the side file beside it."""
        super().save_pretrained(save_directory, **kwargs)
        if self.origin is None:
            return
        content = {"format": _FORMAT, "r": self.r, "lora_alpha": self.lora_alpha}
        content |= asdict(self.origin)
        text = json.dumps(content, indent=2, default=str)
        write_text(Path(save_directory) / SIDE_FILE, text + "\n")


def remember(model: PeftModel, adapter_name: str, origin: Origin) -> None:
    """Attach the origin to the adapter's configuration. Subclasses of LoraConfig are left alone."""
    config = model.peft_config[adapter_name]
    if type(config) is LoraConfig:
        config.__class__ = StartedLoraConfig
    if isinstance(config, StartedLoraConfig):
        config.origin = origin


def origin_of(model: PeftModel, adapter_name: str) -> Origin | None:
    """The origin that the adapter's configuration carries, if any."""
    return getattr(model.peft_config[adapter_name], "origin", None)


def read_origin(folder: Path, config: LoraConfig) -> Origin | None:
    """The origin written beside a saved adapter; None where there is none.

    Args:
        folder: the adapter's own.
        config: its saved configuration, to tell whether the side file belongs to it.

    Raises:
        AdapterError: the side file is damaged, or of another adapter that was saved there before.
    """
    path = folder / SIDE_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["anchored"], bool):
            raise TypeError(f"anchored is {content['anchored']!r}, not true or false")
        found = (content["r"], content["lora_alpha"])
        origin = Origin(
            bool(content["anchored"]),
            content["settings"],
            str(content["version"]),
            dict(content.get("measured", {})),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(
            f"{path} is damaged ({error}). Say anchored=True or anchored=False yourself."
        ) from error
    if found != (config.r, config.lora_alpha):
        raise AdapterError(
            f"{path} was written for r={found[0]}, lora_alpha={found[1]}, but adapter_config.json "
            "says "
            f"r={config.r}, lora_alpha={config.lora_alpha}: another adapter was saved over it. Say "
            "anchored=True or anchored=False yourself."
        )
    return origin
