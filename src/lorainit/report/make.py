"""The report from its inputs: a model, statistics, and perhaps a started adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn
from tqdm.auto import tqdm

from lorainit.adapters.targets import match_targets
from lorainit.checks import check_statistics
from lorainit.methods import METHODS
from lorainit.methods.vanilla import Vanilla
from lorainit.report.advice import advice
from lorainit.report.measure import measure_layer, methods_served
from lorainit.report.page import render
from lorainit.statistics import Statistics


def report(
    model: nn.Module,
    peft_config: LoraConfig,
    statistics: Statistics,
    output: str | os.PathLike[str],
    *,
    methods: Sequence[str] = ("lora-da", "natural", "lora-one", "eva", "pissa"),
    sizes: Mapping[str, float] | None = None,
    anchored: bool = False,
    title: str = "What the data asks of the adapter",
    progress: bool = True,
) -> list[tuple[str, str]]:
    """Write one self-contained HTML page, and return its advice.

    Args:
        model: that the statistics were collected from.
        peft_config: says which layers, and the rank.
        statistics: of these layers, or more.
        output: the page's file.
        methods: names of methods whose subspaces are compared, where the statistics serve them.
        sizes: ``|s B A| / |W|`` by layer, as `lorainit.report.sizes.sizes_of` gives it.
        anchored: whether that adapter's start is subtracted.
        title: of the page.
        progress: show a progress bar.

    Returns:
        Weight (``"warn"``, ``"note"``, ``"good"``) and words.

    Raises:
        TargetError, StatisticsFileError: the three do not fit together.
    """
    targets = match_targets(model, peft_config)
    check_statistics(statistics, targets, Vanilla())
    served = methods_served(statistics, {name: METHODS[name]() for name in methods})
    bar = tqdm(
        [t for name, t in targets.layers.items() if name in statistics],
        desc="report",
        unit="layer",
        disable=None if progress else True,
    )
    layers = [measure_layer(t, statistics[t.name], served, (sizes or {}).get(t.name)) for t in bar]
    metadata: dict[str, Any] = {**statistics.metadata, "anchored": anchored}
    page = render(layers, metadata, title=title, rank=peft_config.r, methods=list(served))
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return advice(layers, metadata)
