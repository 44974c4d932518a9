"""``lorainit report``."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

from lorainit.adapters.layers import true_config
from lorainit.adapters.load import load_adapter
from lorainit.adapters.tensor_sources import named_tensors
from lorainit.cli.checks import named_path
from lorainit.cli.loading import load_model
from lorainit.cli.shared import load_data, lora_config, mean_loss, speaking
from lorainit.report import report
from lorainit.report.curves import read_curves
from lorainit.report.rate_curve import read_rate_curves
from lorainit.report.start_loss import StartLoss
from lorainit.statistics import Statistics


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write the page; its advice is the result."""
    with speaking(options):
        curves = [curve for text in options.curves for curve in read_curves(*named_path(text))]
        rates = [rate for text in options.curves for rate in read_rate_curves(named_path(text)[0])]
        if options.reference:
            named_tensors(options.reference)  # before the model is loaded
        statistics = Statistics.load(options.statistics)
        model, config, loss = load_model(options), lora_config(options), None
        if options.adapter:
            data = load_data(options)
            model = load_adapter(model, options.adapter)
            config = true_config(model, "default")
            if data is not None:
                loss = _measured(options, model, data)
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


def _measured(options: argparse.Namespace, model: Any, data: Any) -> StartLoss:
    batches = list(islice(data, -(-options.max_sequences // options.batch_size)))
    records = sum(len(batch["labels"]) for batch in batches)
    with model.disable_adapter():
        base = mean_loss(model, batches)
    name = Path(options.data).name
    return StartLoss(base, mean_loss(model, batches), f"{records} records of {name}")
