"""Loading a checkpoint whole, or not at all: no weight may be drawn at random without a word."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lorainit.errors import DataError
from lorainit.models.place import check_layers

logger = logging.getLogger("lorainit")

HEADS = ("classifier", "cls", "lm_head", "pooler", "qa_outputs", "score", "v_head", "value_head")
"""First or second parts of the names of heads that another task may have left in a checkpoint."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_whole(
    auto_class: Any, name: str, *, new_head: Iterable[str] = (), **arguments: Any
) -> Any:
    """``auto_class.from_pretrained(name)``, refused unless the checkpoint holds every weight.

    Args:
        auto_class: one of transformers' ``AutoModelFor...``, or a model's own class.
        name: a folder, or a name on the hub.
        new_head: beginnings of the names of a head that the task adds, which may be drawn at random;
            what is drawn is said in the log.
        **arguments: for ``from_pretrained``. ``trust_remote_code`` is False unless given, so that code
            in the folder neither runs nor is asked about.

    Raises:
        DataError: weights are missing, unexpected, of another shape, pickled, or cannot be read; or the
            configuration makes no model.
    """
    arguments = {"trust_remote_code": False, "use_safetensors": True} | arguments
    _check_not_pickled(name, arguments)
    check_layers(name)
    try:
        model, found = auto_class.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except SafetensorError as error:
        raise DataError(
            f"the weights in '{name}' cannot be read ({error}). The file is damaged or cut off: copy or "
            "download the model again."
        ) from None
    except torch.OutOfMemoryError:
        raise
    except (
        ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ) as error:  # fmt: skip
        # Models and their configurations check themselves each in its own way.
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"the model in '{name}' cannot be built from its config.json ({said[:200]}). Give the folder that "
            "the model's save_pretrained wrote, complete."
        ) from error
    check_whole(name, found, tuple(new_head))
    return model


def check_whole(name: str, found: Mapping[str, Any], new_head: tuple[str, ...] = ()) -> None:
    """Refuse what transformers' ``output_loading_info`` says of a checkpoint that does not fit.

    Raises:
        DataError: with the first weight that is missing, of another shape, or belongs to no layer.
    """
    missing = sorted(found.get("missing_keys") or ())
    mismatched = sorted(map(tuple, found.get("mismatched_keys") or ()))
    unexpected = sorted(found.get("unexpected_keys") or ())
    drawn = [key for key in [*missing, *(m[0] for m in mismatched)] if key.startswith(new_head)]
    if new_head and drawn:
        logger.info("'%s' has no %s: drawn at random, as the task's new head", name, drawn[0])
    _refuse(name, "lacks the weight", [key for key in missing if key not in drawn])
    other = [entry for entry in mismatched if entry[0] not in drawn]
    if other:
        _, there, wanted = other[0]
        what = f"has another shape, {tuple(there)} in place of {tuple(wanted)}, of the weight"
        _refuse(name, what, [key for key, *_ in other])
    foreign = [key for key in unexpected if not set(key.split(".")[:2]) & set(HEADS)]
    _refuse(name, "holds a weight that no layer of the model takes,", foreign)
    if unexpected and not foreign:
        logger.info("'%s': the head of another task is not used (%s)", name, unexpected[0])
    errors = list(found.get("error_msgs") or ())
    if errors:
        raise DataError(
            f"the weights in '{name}' do not fit the model ({str(errors[0])[:200]}). Give the folder "
            "that the model's save_pretrained wrote, complete."
        )


def _refuse(name: str, what: str, keys: list[str]) -> None:
    if keys:
        more = f" ({len(keys)} such)" if len(keys) > 1 else ""
        raise DataError(
            f"the checkpoint '{name}' {what} '{keys[0]}'{more}: it is not whole, or of another model than "
            "its config.json says. Copy or download it again."
        )


def _check_not_pickled(name: str, arguments: Mapping[str, Any]) -> None:
    folder = Path(name)
    if not folder.is_dir() or arguments.get("gguf_file") or any(folder.glob("*.safetensors*")):
        return
    pickled = sorted(path.name for kind in _PICKLED for path in folder.glob(kind))
    if pickled:
        raise DataError(
            f"the weights in '{name}' are pickled ({pickled[0]}), and reading a pickle can run code that is "
            "hidden in it. If you trust it, save it as safetensors once: "
            "AutoModelForCausalLM.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW)."
        )
    raise DataError(
        f"'{name}' holds no weights (no .safetensors file). Give the folder that save_pretrained wrote, "
        "complete."
    )
