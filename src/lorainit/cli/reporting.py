"""``lorainit report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lorainit.adapters.load import load_adapter
from lorainit.adapters.origin import origin_of
from lorainit.cli.shared import load_model, lora_config, names_of, speaking
from lorainit.report import report
from lorainit.report.sizes import sizes_of
from lorainit.statistics import Statistics


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write the page; its advice is the result."""
    with speaking(options):
        names = names_of(options.methods)
        statistics = Statistics.load(options.statistics)
        model = load_model(options)
        sizes, anchored = None, False
        if options.adapter:
            model = load_adapter(model, options.adapter)
            sizes = sizes_of(model)
            origin = origin_of(model, "default")
            anchored = origin is not None and origin.anchored
        said = report(
            model,
            lora_config(options),
            statistics,
            options.output,
            methods=names,
            sizes=sizes,
            anchored=anchored,
            title=f"{Path(options.model).name}: what the data asks of the adapter",
            progress=not (options.quiet or options.json),
        )
    result = {"output": options.output, "advice": [{"kind": k, "text": t} for k, t in said]}
    return result, "\n".join([f"{options.output}:", *(f"  {text}" for _, text in said)])
