"""Lightning: a callback that starts the adapter when ``fit`` begins, before the optimizer is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, Unpack

from torch import Tensor, nn

from lorainit.adapters.layers import adapter_layers, configurations
from lorainit.data.batch import Batch
from lorainit.errors import AdapterError, DataError, MissingExtraError
from lorainit.models.introspection import input_device
from lorainit.models.state import measuring, unchanged_generators, unchanged_rng
from lorainit.pipeline import get_peft_model
from lorainit.statistics.settings import CollectOptions
from lorainit.types import Method

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise MissingExtraError(
        "lorainit.integrations.lightning needs the package lightning: pip install lightning"
    ) from error

_LOGS = ("log", "log_dict")


class StartAdapter(Callback):  # type: ignore[misc]
    """``Trainer(callbacks=[StartAdapter()])``: the adapter inside the module starts from its training batches.

    Args:
        method: how to find the start. Default: ``lorainit.Auto()``.
        data: batches to measure on. Default: those of the training loader, which begins anew afterwards.
        loss: ``"step"``: what ``training_step(batch, 0)`` returns, a mean over the batch's sequences, where a
            batch is one unit that is never cut; ``"model"``: the model's own loss of every sequence, of
            batches that are the model's keywords.
        adapter_name: of the adapter to start.
        **options: fields of `CollectSettings`, as keywords; ``max_sequences`` counts sequences.

    Raises:
        AdapterError: the module holds no LoRA adapter of this name.
        DataError: batches that cannot be measured.
    """

    def __init__(
        self,
        method: Method | None = None,
        *,
        data: Iterable[Any] | None = None,
        loss: str = "step",
        adapter_name: str = "default",
        **options: Unpack[CollectOptions],
    ) -> None:
        if loss not in ("step", "model"):
            raise AdapterError(f"loss must be 'step' or 'model', got {loss!r}")
        self.method, self.data, self.loss = method, data, loss
        self.adapter_name, self.options = adapter_name, options

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the adapter; not where the fit goes on from a checkpoint, which holds it."""
        if getattr(trainer, "ckpt_path", None) is not None:
            return
        model = _model_with(pl_module, self.adapter_name)
        data = self.data if self.data is not None else _training_data(trainer)
        options: dict[str, Any] = dict(self.options)
        with ExitStack() as stack:
            stack.enter_context(unchanged_rng(input_device(model)))
            if self.loss == "step":
                stack.enter_context(_without_logs(pl_module))
                stack.enter_context(measuring(pl_module))
                options["loss_fn"] = _step_loss(pl_module)
                stack.enter_context(unchanged_generators(data))
                data = _whole(data, options.get("max_sequences", 256))
            get_peft_model(
                model,
                None,
                method=self.method,
                data=data,
                adapter_name=self.adapter_name,
                **options,
            )


def _model_with(module: nn.Module, adapter_name: str) -> nn.Module:
    for model in module.modules():
        if configurations(model) and adapter_layers(model, adapter_name):
            return model
    raise AdapterError(
        f"{type(module).__name__} holds no model with a LoRA adapter '{adapter_name}': wrap its model with "
        "peft.get_peft_model(model, config) when the module is made."
    )


def _training_data(trainer: Any) -> Iterable[Any]:
    source = trainer.fit_loop._data_source
    found = source.dataloader()
    if isinstance(found, dict | list | tuple) or not isinstance(found, Iterable):
        raise DataError(
            f"the training loader is a {type(found).__name__}, of which no batches can be drawn by themselves. "
            "Pass StartAdapter(data=...), an iterable of the module's batches."
        )
    return found


def _whole(data: Iterable[Any], most: int | None) -> list[Batch]:
    """The first batches, none of which is cut, and how many sequences each counts."""
    found: list[Batch] = []
    seen = 0
    for content in data if most is None else islice(data, most):
        count = max(1, Batch.arrived(content, 0, own_loss=True).sequences)
        if isinstance(content, list | tuple):
            count = next((t.shape[0] for t in content if isinstance(t, Tensor) and t.dim()), count)
        found.append(Batch(content, whole=True, losses=count))
        seen += count
        if most is not None and seen >= most:
            break
    return found


def _step_loss(module: Any) -> Any:
    """What the module's training step returns, as often as the batch holds sequences."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = module.training_step(batch, 0)
        found = found["loss"] if isinstance(found, dict) else found
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise DataError(
                f"{type(module).__name__}.training_step returned {type(found).__name__}, not one loss. "
                "Return it, or pass StartAdapter(loss='model')."
            )
        count = _whole([batch], None)[0].sequences
        return found.reshape(1).expand(count)

    return loss


@contextmanager
def _without_logs(module: Any) -> Iterator[None]:
    """Lightning takes logged values only inside its loops."""
    held = vars(module)
    before = {name: held[name] for name in _LOGS if name in held}
    held.update({name: lambda *args, **kwargs: None for name in _LOGS})
    try:
        yield
    finally:
        for name in _LOGS:
            del held[name]
        held.update(before)
