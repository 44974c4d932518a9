"""Where an adapter came from, carried by its configuration and written beside it.

PEFT writes one configuration for every adapter that it saves, whoever asks: `save_pretrained`, a
Trainer's checkpoint, an upload. So the configuration is the place from which a small side file is
written too. Nothing reads it but `lorainit.load_adapter`, and an adapter without it is as good.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from lorainit._version import __version__
from lorainit.errors import AdapterError
from lorainit.files.atomic import write_text

SIDE_FILE = "lorainit.json"
_FORMAT = 2
_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
)  # in the order that PEFT looks for them


@dataclass(frozen=True)
class Origin:
    """How an adapter was started.

    Attributes:
        anchored: the second half of every factor's rank is the frozen start.
        settings: the method's name and settings, JSON-ready.
        version: of this package.
        measured: where the length was measured: ``base_loss``, ``start_loss``, on the sequences held
            back, the ``length``, and the ``factors_norm`` of the start, by which it is told from one that was
            trained since; where plain LoRA was taken in place of the start that was measured,
            that one's loss as ``refused_loss``; and how many ``sequences`` they rest on, with the standard
            error of their difference as ``gain_error``. How many sequences were read: ``data_sequences`` of the
            data, those held back among them, ``statistics_sequences`` of statistics that were given. Where a
            learning rate was suggested:
            ``learning_rate``, its range ``learning_rate_low`` and ``learning_rate_high``, the
            ``two_steps_rate``, and every rate and loss that was tried under ``learning_rate_trials``.
        heads: where heads beside the adapter were fitted first: their names under ``fitted`` (none where
            they were left as they are), ``loss_before`` and ``loss_after`` on the sequences held back, the
            ``standard_error`` of what the minimum takes off it, the number of these ``sequences``, and the
            ``weight_decay``.
        statistics: the file that it was started from, as ``lorainit init`` was given it; what
            ``lorainit report`` reads by default.
        data: the same of the records, of which ``lorainit report`` takes statistics where there is no file of
            them.
        resized: the factors are so many times what the start gave, and every alpha is divided by its square
            (`match_learning_rate`); 1 where nothing was resized.
    """

    anchored: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__
    measured: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, Any] = field(default_factory=dict)
    statistics: str | None = None
    data: str | None = None
    resized: float = 1.0


class StartedLoraConfig(LoraConfig):  # type: ignore[misc]
    """A LoraConfig that remembers how its adapter was started; the same fields, the same file."""

    origin: Origin | None = None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` as PEFT does, and the side file beside it.

        The side file names the weights that lie there, which PEFT writes before the configuration.
        """
        super().save_pretrained(save_directory, **kwargs)
        if self.origin is None:
            return
        content = {"format": _FORMAT, "r": self.r, "lora_alpha": self.lora_alpha}
        content |= asdict(self.origin)
        content["weights_sha256"] = _digest(Path(save_directory))
        text = json.dumps(content, indent=2, default=str)
        write_text(Path(save_directory) / SIDE_FILE, text + "\n")


def _digest(folder: Path) -> str | None:
    """SHA-256 of the weights in a folder; None where there are none."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return None


def remember(model: nn.Module, adapter_name: str, origin: Origin) -> None:
    """Attach the origin to the adapter's configuration. Subclasses of LoraConfig are left alone."""
    config = model.peft_config[adapter_name]  # type: ignore[index, union-attr]
    if type(config) is LoraConfig:
        config.__class__ = StartedLoraConfig
    if isinstance(config, StartedLoraConfig):
        config.origin = origin


def remember_measured(model: nn.Module, adapter_name: str, measured: Mapping[str, Any]) -> None:
    """Add to what was measured for an adapter; without effect where it has no origin."""
    origin = getattr(model.peft_config[adapter_name], "origin", None)  # type: ignore[index, union-attr]
    if origin is not None:
        known = {**origin.measured, **measured}
        remember(model, adapter_name, replace(origin, measured=known))


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
    remedy = "Say anchored=True or anchored=False yourself."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = (content["r"], content["lora_alpha"])
        anchored = content["anchored"]
        if not isinstance(anchored, bool):
            raise TypeError(f"'anchored' is {anchored!r}, neither true nor false")
        origin = Origin(
            anchored,
            content["settings"],
            str(content["version"]),
            dict(content.get("measured", {})),
            dict(content.get("heads", {})),
            content.get("statistics"),
            content.get("data"),
            float(content.get("resized", 1.0)),
        )
        digest = content.get("weights_sha256")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged ({error}). {remedy}") from error
    if found != (config.r, config.lora_alpha):
        raise AdapterError(
            f"{path} was written for r={found[0]}, lora_alpha={found[1]}, but adapter_config.json says "
            f"r={config.r}, lora_alpha={config.lora_alpha}: another adapter was saved over it. {remedy}"
        )
    if anchored and digest is None:
        raise AdapterError(
            f"{path} does not name the weights that it belongs to: it was written by an older version, or "
            f"before the weights were. {remedy}"
        )
    if anchored and digest != _digest(folder):
        raise AdapterError(
            f"{path} was written with other weights than those that lie beside it: another adapter was "
            f"saved over it, or the weights were changed. {remedy}"
        )
    return origin
