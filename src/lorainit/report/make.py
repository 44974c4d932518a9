"""The report from its inputs: a model, statistics, and perhaps a started adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from tqdm.auto import tqdm

from lorainit.adapters.origin import origin_of
from lorainit.adapters.targets import match_targets
from lorainit.adapters.tensor_sources import TensorSource
from lorainit.errors import MissingStatisticError
from lorainit.files.atomic import write_text
from lorainit.methods import METHODS
from lorainit.methods.vanilla import Vanilla
from lorainit.pipeline.checks import check_statistics, with_possible_ranks
from lorainit.report.advice import advice
from lorainit.report.curves import Curve
from lorainit.report.measure import measure_layer, methods_served, spread
from lorainit.report.page import Facts, render
from lorainit.report.quantization import displacements_of, quantization_loss, reference_of
from lorainit.report.rate_curve import RateCurve, of_measured
from lorainit.report.sizes import sizes_of
from lorainit.report.start_loss import StartLoss, measured_loss
from lorainit.statistics import Statistics

_DEPTHS_COMPARED = 8
"""Every method is solved again for the layers of so many depths; for all it would take longest."""


def report(
    model: nn.Module,
    peft_config: LoraConfig,
    statistics: Statistics | None,
    output: str | os.PathLike[str],
    *,
    methods: Sequence[str] = ("lora-da", "natural", "lora-one", "eva", "pissa"),
    adapter_name: str = "default",
    loss: StartLoss | None = None,
    curves: Sequence[Curve] = (),
    reference_weights: TensorSource | None = None,
    rates: Sequence[RateCurve] = (),
    title: str = "What the data asks of the adapter",
    progress: bool = True,
) -> list[tuple[str, str]]:
    """Write one self-contained HTML page, and return its advice.

    Args:
        model: that the statistics were collected from; or a PeftModel of it, of whose adapter the page
            shows the size, and the loss before and after, too.
        peft_config: says which layers, and the rank.
        statistics: of these layers, or more. None: the page has what the adapter and its record say: its
            sizes, the loss at the start, the rates that were tried.
        output: the page's file.
        methods: names of methods whose subspaces are compared, where the statistics serve them.
        adapter_name: of the adapter shown, where `model` is a PeftModel.
        loss: before and after the start, measured; None: as it was measured when the adapter was
            started, if it was (`lorainit.Natural` does).
        curves: learning curves, as `lorainit.report.read_curves` gives them.
        reference_weights: of a quantized model, the full-precision weights, as `lorainit.get_peft_model` takes
            them: the page shows what quantization took from every layer's outputs, and what the adapter gives
            back. Read layer by layer.
        rates: losses by learning rate, as `lorainit.report.read_rate_curves` gives them; those that the
            adapter's suggestion rests on stand before them.
        title: of the page.
        progress: show a progress bar.

    Returns:
        Weight (``"warn"``, ``"note"``, ``"good"``) and words. The first three are always there, one
        sentence each on the learning rate, the rank and the method; what else stands out follows.

    Raises:
        TargetError, StatisticsFileError, RankError: the three do not fit together.
        AdapterError: the reference weights are not what was quantized.
        MissingStatisticError: reference weights are given, and no statistics, or none that hold the inputs'
            second moment.
    """
    targets = match_targets(model, peft_config)
    if statistics is not None:
        check_statistics(statistics, targets, Vanilla())
    elif reference_weights is not None:
        raise MissingStatisticError(
            "what quantization took is measured in the inputs' second moment: give statistics, which "
            "collect_statistics takes, or records to take them of."
        )
    if not isinstance(model, PeftModel):
        with_possible_ranks(model, peft_config, targets, Vanilla(), cap_rank=False)
    known = {name: METHODS[name]() for name in methods}
    served = {} if statistics is None else methods_served(statistics, known)
    sizes: Mapping[str, float] = {}
    origin, adapter = None, False
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        adapter, sizes = True, sizes_of(model, adapter_name)
        origin = origin_of(model, adapter_name)
        if loss is None and origin is not None:
            loss = measured_loss(origin.measured)
        if origin is not None and (trials := of_measured(origin.measured)) is not None:
            rates = [trials, *rates]
    measured = [t for n, t in targets.layers.items() if statistics is None or n in statistics]
    reference, displacements = None, {}
    if reference_weights is not None and statistics is not None:
        reference = reference_of(reference_weights, measured, statistics)
        if adapter:
            displacements = displacements_of(model, adapter_name)
    compared = spread(measured, _DEPTHS_COMPARED)
    spectra: dict[int, tuple[list[float], float]] = {}
    bar = tqdm(
        measured,
        desc="report",
        unit="layer",
        disable=None if progress else True,
    )
    layers = []
    for target in bar:
        taken = None if statistics is None else statistics[target.name]
        found = measure_layer(
            target,
            taken,
            served if target.name in compared else {},
            spectra=spectra,
            size=sizes.get(target.name),
        )
        if reference is not None and taken is not None:
            found.quantization = quantization_loss(
                target, taken, reference, displacements.get(target.name)
            )
        layers.append(found)
    metadata: dict[str, Any] = {} if statistics is None else {**statistics.metadata}
    anchored = origin is not None and origin.anchored
    facts = Facts(metadata, peft_config.r, anchored, loss, list(served), list(curves), rates)
    said = advice(layers, metadata, rank=peft_config.r, adapter=adapter, origin=origin, loss=loss)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(layers, facts, said, title=title))
    return said
