"""Tools whose only hook is a ``TrainerCallback``, as LLaMA-Factory's ``run_exp(args, callbacks=[...])``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Unpack

from transformers import TrainerCallback

from lorainit.adapters.match_learning_rate import take_alpha_of
from lorainit.statistics.settings import CollectOptions
from lorainit.trainers import start_trainer
from lorainit.trainers.kinds import adapter_of
from lorainit.types import Method


class StartAdapter(TrainerCallback):  # type: ignore[misc]
    """Starts the adapter when the training begins, on the training loader and the model's own loss.

    The optimizer exists by then, so the start is written into the parameters that it holds; where it holds
    others (DeepSpeed, FSDP1), that is an error before any work. The trainer itself, and so its own loss, is
    out of a callback's reach: it is for supervised fine-tuning and pretraining. A run that resumes
    from a checkpoint is left alone.

    Args:
        method: how to find the start. Default: ``lorainit.Auto()``.
        adapter_name: of the adapter to start. Default: the active one.
        match_learning_rate: see `start_trainer`. A run that resumes takes ``lora_alpha`` from its checkpoint in
            ``output_dir``.
        **options: fields of `CollectSettings`, as keywords; a ``loss_fn`` takes the loader's batches.

    Raises:
        AdapterError: no adapter, an optimizer of other parameters, or a matched run that resumes from a
            checkpoint outside ``output_dir``.
        DataError: batches without labels, and no ``loss_fn``.
    """

    def __init__(
        self,
        method: Method | None = None,
        *,
        adapter_name: str | None = None,
        match_learning_rate: bool = False,
        **options: Unpack[CollectOptions],
    ) -> None:
        self.method, self.adapter_name, self.options = method, adapter_name, options
        self.match_learning_rate = match_learning_rate

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Start the adapter, unless steps have been taken."""
        if state.global_step > 0:
            if self.match_learning_rate:
                inner, name = adapter_of(SimpleNamespace(model=model), self.adapter_name)
                checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                take_alpha_of(inner, name, checkpoint)
            return
        loader = train_dataloader
        iteration = getattr(loader, "iteration", None)
        trainer = SimpleNamespace(
            model=model,
            args=args,
            state=state,
            optimizer=optimizer,
            accelerator=SimpleNamespace(),
            train_dataset=getattr(loader, "dataset", None),
            get_train_dataloader=lambda: loader,
            compute_loss=None,
            _train_batch_size=getattr(args, "train_batch_size", None),
        )
        try:
            start_trainer(
                trainer,
                self.method,
                None if "loss_fn" in self.options else "model",
                adapter_name=self.adapter_name,
                set_learning_rate=False,
                match_learning_rate=self.match_learning_rate,
                **self.options,
            )
        finally:
            if iteration is not None:
                # Which epoch's order a loader gives depends on how often it was read to its end.
                loader.iteration = iteration
