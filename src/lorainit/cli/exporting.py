"""``lorainit export``."""

from __future__ import annotations

import argparse
from typing import Any

from lorainit.adapters.export import export
from lorainit.adapters.load import load_adapter
from lorainit.cli.loading import load_model
from lorainit.cli.shared import speaking


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Load the adapter on its model and write it for servers."""
    with speaking(options):
        model = load_adapter(load_model(options), options.adapter)
        report = export(model, options.output, rank=options.rank, max_rank=options.max_rank)
    result = {
        "output": str(report.folder),
        "rank": report.rank,
        "scaling": report.scaling,
        "largest_error": report.largest_error,
        "objections": list(report.objections),
    }
    text = f"{report.folder}: rank {report.rank}, scaling {report.scaling:.4g}"
    if report.largest_error > 0:
        text += f", largest relative error of a layer {report.largest_error:.2g}"
    return result, "\n".join([text, *(f"a server may object: {o}" for o in report.objections)])
