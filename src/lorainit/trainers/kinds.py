"""What the trainers that are served differ in: where the adapter is, what a batch holds, which loss is theirs.

Trainers are told by what they have and by the names of their classes, so that none of their packages is
imported here.
"""

from __future__ import annotations

from typing import Any, Literal

from peft import PeftModel
from torch import nn

from lorainit.adapters.layers import adapter_layers, configurations
from lorainit.data.batch import Batch
from lorainit.errors import AdapterError

Loss = Literal["model", "trainer"]

_PAIRS = frozenset({"DPOTrainer", "RewardTrainer"})
"""Trainers of TRL whose batches hold all chosen answers, then all rejected ones."""

_PREFERENCES = frozenset(
    {"DPOTrainer", "KTOTrainer", "ORPOTrainer", "CPOTrainer", "BCOTrainer", "RewardTrainer"}
)
"""Trainers of TRL that learn from answers that are liked more and less."""

_NEEDED = ("model", "args", "accelerator", "state", "compute_loss", "get_train_dataloader")


def check_trainer(trainer: object) -> None:
    """Raise unless it is a ``transformers.Trainer``, or has what one has."""
    lacking = [name for name in _NEEDED if not hasattr(trainer, name)]
    if lacking or isinstance(trainer, type):
        raise AdapterError(
            f"start_trainer takes a transformers.Trainer or one made of it, not a {type(trainer).__name__} "
            f"(it has no {', '.join(lacking) or 'instance'}). For your own loop, call "
            "lorainit.get_peft_model(model, None, data=...) before the optimizer is made."
        )


def adapter_of(trainer: Any, adapter_name: str | None) -> tuple[nn.Module, str]:
    """The model that has the adapter, the trainer's own or one inside it, and the adapter's name.

    Args:
        trainer: as built.
        adapter_name: None for the one that is active.

    Raises:
        AdapterError: no LoRA adapter, several that are active, or none of this name.
    """
    for model in trainer.model.modules():
        known = configurations(model)
        if not known:
            continue
        name = adapter_name or _active(model, list(known))
        if not adapter_layers(model, name):
            raise AdapterError(
                f"the trainer's model has no LoRA adapter '{name}'; it has: {', '.join(known)}. Pass one "
                "of these as adapter_name=..."
            )
        return model, name
    raise AdapterError(
        f"the trainer's model ({type(trainer.model).__name__}) has no LoRA adapter yet. Give the trainer "
        "peft_config=LoraConfig(...) (TRL), or peft.get_peft_model(model, config) as its model, or call "
        "model.add_adapter(config) before the trainer is built (transformers, sentence-transformers)."
    )


def _active(model: nn.Module, known: list[str]) -> str:
    active = getattr(model, "active_adapters", known)
    names = list(active() if callable(active) else active)
    if len(names) != 1:
        raise AdapterError(
            f"the trainer's model has {len(names)} active adapters ({', '.join(names) or 'none'}): say which "
            "one to start, adapter_name=..."
        )
    return str(names[0])


def check_reference(model: nn.Module, adapter_name: str) -> None:
    """Refuse where the trainer compares with a copy of an adapter that was trained.

    TRL keeps such a copy under the name ``"ref"`` where it was given a ready PeftModel. The copy of a fresh
    adapter is the base model, as every start's reference is.
    """
    if not isinstance(model, PeftModel) or adapter_name == "ref":
        return
    for name, layer in adapter_layers(model, "ref").items():
        if "ref" in layer.lora_B and bool((layer.lora_B["ref"].weight != 0).any()):
            raise AdapterError(
                f"the trainer's reference is the adapter 'ref', a copy of one that moves layer '{name}', while "
                "a start replaces the adapter that learns. Merge the old adapter into the base "
                "(merge_and_unload), and give the trainer the base with peft_config=LoraConfig(...)."
            )


def loss_of(trainer: Any) -> Loss:
    """Whether what the trainer minimizes is the model's own loss of a batch, or something else.

    Its own are every ``compute_loss`` but that of ``transformers`` and of TRL's supervised fine-tuning, and
    these with label smoothing, a ``compute_loss_func`` or another loss type.
    """
    if getattr(trainer, "compute_loss_func", None) is not None:
        return "trainer"
    if getattr(trainer, "label_smoother", None) is not None:
        return "trainer"
    if "compute_loss" in vars(trainer):
        return "trainer"
    owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    package = owner.__module__.partition(".")[0]
    if package == "transformers":
        return "model"
    plain = getattr(trainer.args, "loss_type", "nll") == "nll"
    return "model" if package == "trl" and owner.__name__ == "SFTTrainer" and plain else "trainer"


def examples_in(trainer: Any, content: object) -> int:
    """How many examples a batch of the trainer's holds: sequences, or pairs of answers."""
    count = Batch.arrived(content, 0, own_loss=True).sequences
    return max(1, count // 2) if _is_one_of(trainer, _PAIRS) else max(1, count)


def is_on_policy(trainer: Any) -> bool:
    """Whether the trainer makes its batches of what the model answers: GRPO, RLOO and what is made of them."""
    return hasattr(trainer, "_generate_and_score_completions") and hasattr(
        trainer.args, "steps_per_generation"
    )


def has_preferences(trainer: Any) -> bool:
    """Whether the trainer learns from answers that are liked more and less."""
    return _is_one_of(trainer, _PREFERENCES)


def _is_one_of(trainer: Any, names: frozenset[str]) -> bool:
    return any(kind.__name__ in names for kind in type(trainer).__mro__)
