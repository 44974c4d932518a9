"""``lorainit train``: a thin front on TRL's SFTTrainer."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from peft import PeftModel
from torch.utils.data import Dataset

from lorainit.adapters.card import write_card
from lorainit.adapters.load import load_adapter
from lorainit.adapters.origin import origin_of
from lorainit.adapters.save import adapter_files
from lorainit.cli.choices import method_of
from lorainit.cli.loading import device_of, load_model, load_tokenizer
from lorainit.cli.plan import plan
from lorainit.cli.shared import load_data, load_records, sample_arguments, speaking
from lorainit.cli.starting import start_model
from lorainit.data import Example
from lorainit.errors import DataError
from lorainit.pipeline import suggest_learning_rate
from lorainit.pipeline.rate import SEQUENCES
from lorainit.report.curves import STATE_FILE

logger = logging.getLogger("lorainit")

_SHARE_BETWEEN_RECORDS = 0.05
"""Of all steps: about twenty records of the loss."""

_USUAL_RATE = 2e-4
"""Where none can be measured: what most tools have as their default."""


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Load or make a start, and train it."""
    import datasets
    import trl

    with speaking(options):
        tokenizer = load_tokenizer(options)
        examples: Dataset[Example] = load_records(options, tokenizer)
        if options.dry_run:
            return _plan(options, len(examples))  # type: ignore[arg-type]
        rows = _rows(examples)
        if options.adapter:
            model = load_adapter(load_model(options), options.adapter, is_trainable=True)
        else:
            options.statistics = None
            model = start_model(options, method_of(options))
        rate, whose = _rate(options, model)
        settings = trl.SFTConfig(
            output_dir=options.output,
            learning_rate=rate,
            num_train_epochs=options.epochs,
            max_steps=options.max_steps,
            warmup_steps=options.warmup_ratio,
            per_device_train_batch_size=options.batch_size,
            # Below one it is a share of all steps.
            logging_steps=options.logging_steps or _SHARE_BETWEEN_RECORDS,
            logging_first_step=True,
            max_length=None,
            save_strategy="no",
            report_to=[],
            seed=options.seed,
            use_cpu=device_of(options).type == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=options.quiet,
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=settings,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[_last_step_recorded()],
        )
        if options.quiet:
            from transformers import PrinterCallback

            trainer.remove_callback(PrinterCallback)
        trainer.train()
        with adapter_files(options.output) as aside:
            model.save_pretrained(str(aside))
            write_card(model, aside)
            # What 'lorainit report --curves' and people look for.
            trainer.state.save_to_json(str(aside / STATE_FILE))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = trainer.state.global_step
    result = {"output": options.output, "steps": steps, "losses": losses, "learning_rate": rate}
    text = f"{options.output}: {steps} steps at learning rate {rate:.2g} ({whose})"
    if losses:
        text += f", loss {losses[0]:.4g} at first, {losses[-1]:.4g} at last"
    return result, text


def _last_step_recorded() -> Any:
    """A callback that has the Trainer log the last step, whatever `logging_steps` is."""
    from transformers import TrainerCallback

    class LastStep(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_log = control.should_log or state.global_step >= state.max_steps

    return LastStep()


def _rate(options: argparse.Namespace, model: PeftModel) -> tuple[float, str]:
    """The peak learning rate, and where it is from."""
    if options.learning_rate is not None:
        return options.learning_rate, "given"
    origin = origin_of(model, "default")
    if origin is not None and "learning_rate" in origin.measured:
        return origin.measured["learning_rate"], "measured with the start"
    data = load_data(options)
    assert data is not None
    arguments = sample_arguments(options) | {"max_sequences": SEQUENCES}
    try:
        return suggest_learning_rate(model, data, **arguments).value, "measured"
    except DataError as error:
        logger.warning("%s Trained at %g.", error, _USUAL_RATE)
        return _USUAL_RATE, "no rate could be measured"


def _plan(options: argparse.Namespace, records: int) -> tuple[dict[str, Any], str]:
    method = method_of(options) if options.method else None
    trained = options.epochs * records
    if options.max_steps > 0:
        trained = options.max_steps * options.batch_size
    return plan(
        options,
        method.needs if method else frozenset(),
        steps=getattr(method, "steps", 1),
        searched=bool(getattr(method, "calibrated", False)),
        trained=trained,
        rates=int(options.learning_rate is None),
    )


def _rows(examples: Any) -> list[dict[str, list[int]]]:
    """Encoded here and not by TRL, so that training learns the tokens that the start was found by."""
    rows = [examples[i] for i in range(len(examples))]
    kept = [e for e in rows if e.teaches]
    if not kept:
        raise ValueError(
            "no record has a token to learn: every label is masked. Look at the data, or raise "
            "--max-length, which may cut the answers off."
        )
    return [{"input_ids": e.input_ids, "labels": e.labels} for e in kept]
