"""``lorainit report``."""

from __future__ import annotations

import argparse
import logging
from itertools import islice
from pathlib import Path
from typing import Any

from peft import LoraConfig

from lorainit.adapters.layers import true_config
from lorainit.adapters.load import load_adapter
from lorainit.adapters.origin import origin_of
from lorainit.adapters.tensor_sources import named_tensors
from lorainit.cli.checks import named_path
from lorainit.cli.loading import load_model
from lorainit.cli.report_sources import same_file
from lorainit.cli.shared import load_data, lora_config, mean_loss, speaking
from lorainit.methods import EVA, Natural
from lorainit.pipeline import collect_statistics
from lorainit.report import report
from lorainit.report.curves import read_curves
from lorainit.report.rate_curve import read_rate_curves
from lorainit.report.start_loss import StartLoss, measured_loss
from lorainit.statistics import Statistics

logger = logging.getLogger("lorainit")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write the page; its advice is the result."""
    with speaking(options):
        curves = [curve for text in options.curves for curve in read_curves(*named_path(text))]
        rates = [rate for text in options.curves for rate in read_rate_curves(named_path(text)[0])]
        if options.reference:
            named_tensors(options.reference)  # before the model is loaded
        statistics = Statistics.load(options.statistics) if options.statistics else None
        model, config, loss = load_model(options), lora_config(options), None
        if options.adapter:
            model = load_adapter(model, options.adapter)
            config = true_config(model, "default")
            if options.data and not _measured_at_start(options, model):
                loss = _measured(options, model, load_data(options))
        if options.records:
            statistics = _taken(options, model, config)
        elif statistics is None:
            logger.info(
                "no statistics and no data: the page has what the record of '%s' says. Give --data FILE "
                "for what the data ask of each layer",
                options.adapter,
            )
        said = report(
            model,
            config,
            statistics,
            options.output,
            methods=list(options.methods),
            loss=loss,
            curves=curves,
            reference_weights=options.reference,
            rates=rates,
            title=f"{Path(options.model).name}: what the data asks of the adapter",
            progress=not options.quiet,
        )
    result = {"output": options.output, "advice": [{"kind": k, "text": t} for k, t in said]}
    return result, "\n".join([f"{options.output}:", *(f"  {text}" for _, text in said)])


def _taken(options: argparse.Namespace, model: Any, config: LoraConfig) -> Statistics:
    """Statistics of the records, as 'lorainit collect' takes them unless told otherwise."""
    logger.info("statistics are taken of %s", options.records)
    data = load_data(argparse.Namespace(**{**vars(options), "data": options.records}))
    assert data is not None
    return collect_statistics(
        model,
        config,
        data=data,
        needs=Natural.needs | EVA().needs,
        max_sequences=options.max_sequences,
        max_memory=options.max_memory,
        progress=not options.quiet,
    )


def _measured_at_start(options: argparse.Namespace, model: Any) -> bool:
    """Whether the record has the loss of records held back from the very data that is given."""
    origin = origin_of(model, "default")
    if origin is None or measured_loss(origin.measured) is None:
        return False
    return same_file(options.data, origin.data)


def _measured(options: argparse.Namespace, model: Any, data: Any) -> StartLoss:
    batches = list(islice(data, -(-options.max_sequences // options.batch_size)))
    records = sum(len(batch["labels"]) for batch in batches)
    with model.disable_adapter():
        base = mean_loss(model, batches)
    name = Path(options.data).name
    return StartLoss(base, mean_loss(model, batches), f"{records} records of {name}")
