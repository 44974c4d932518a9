"""axolotl: a plugin that starts the adapter between the trainer and its training.

In the configuration::

    plugins:
      - lorainit.integrations.axolotl.LorainitPlugin
    lorainit:
      method: lora-da
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorainit.errors import AdapterError, MissingExtraError
from lorainit.integrations.fused_kernels import layers_called_one_by_one
from lorainit.methods import METHODS
from lorainit.trainers import start_trainer

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel
except ImportError as error:
    raise MissingExtraError(
        f"lorainit.integrations.axolotl needs the package axolotl, whole: {error}"
    ) from error


class LorainitSection(BaseModel):  # type: ignore[misc]
    """The section ``lorainit:``.

    Attributes:
        method: a method's name on the command line.
        settings: the method's own.
        loss: see `start_trainer`.
        max_sequences: see `CollectSettings`.
        max_memory: see `CollectSettings`.
        set_learning_rate: see `start_trainer`; axolotl always writes a rate of its own, so it is off.
        match_learning_rate: see `start_trainer`: the adapter is resized for the rate that axolotl has.
    """

    method: str = "auto"
    settings: dict[str, Any] = {}
    loss: str | None = None
    max_sequences: int | None = 256
    max_memory: int | str | None = None
    set_learning_rate: bool = False
    match_learning_rate: bool = False


class LorainitArgs(BaseModel):  # type: ignore[misc]
    """What the plugin adds to axolotl's configuration."""

    lorainit: LorainitSection | None = None


class LorainitPlugin(BasePlugin):  # type: ignore[misc]
    """Starts the adapter of axolotl's trainer."""

    def get_input_args(self) -> str:
        """Where axolotl finds what the plugin adds to its configuration."""
        return "lorainit.integrations.axolotl.LorainitArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Start the adapter, if there is one; a checkpoint that the training goes on from is read over it.

        Raises:
            AdapterError: an unknown method, or see `start_trainer`.
        """
        if cfg.adapter is None:
            return
        section = _section(cfg.lorainit)
        if section.method not in METHODS:
            raise AdapterError(
                f"lorainit: method: there is no '{section.method}'. There are: {', '.join(METHODS)}."
            )
        method = METHODS[section.method](**section.settings)
        with layers_called_one_by_one(trainer.model):
            start_trainer(
                trainer,
                method,
                section.loss,  # type: ignore[arg-type]
                set_learning_rate=section.set_learning_rate,
                match_learning_rate=section.match_learning_rate,
                max_sequences=section.max_sequences,
                max_memory=section.max_memory,
            )


def _section(given: Any) -> LorainitSection:
    if given is None:
        return LorainitSection()
    if isinstance(given, LorainitSection):
        return given
    content = given if isinstance(given, Mapping) else vars(given)
    return LorainitSection(**dict(content))
