"""``lorainit collect`` and ``lorainit init``."""

from __future__ import annotations

import argparse
import dataclasses
import statistics as stats
from typing import Any

from peft import PeftModel

from lorainit.adapters.origin import origin_of, remember
from lorainit.adapters.save import save_adapter
from lorainit.cli.choices import class_of, known_methods, method_of, needs_of
from lorainit.cli.loading import load_model
from lorainit.cli.plan import plan
from lorainit.cli.shared import (
    load_data,
    lora_config,
    sample_arguments,
    size_in_words,
    speaking,
)
from lorainit.pipeline import collect_statistics, get_peft_model
from lorainit.report.sizes import sizes_of
from lorainit.statistics import Statistics
from lorainit.types import settings_of


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Either command."""
    with speaking(options):
        return _collect(options) if options.command == "collect" else _init(options)


def _collect(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    needs = needs_of(options.method)
    if options.dry_run:
        return plan(options, needs)
    data = load_data(options)
    assert data is not None
    found = collect_statistics(
        load_model(options), lora_config(options), data=data, needs=needs,
        **sample_arguments(options),
    )  # fmt: skip
    found.save(options.output)
    result = {
        "output": options.output,
        "layers": len(found),
        "bytes": found.nbytes,
        **found.metadata,
    }
    serves = [n for n in known_methods(options.method) if class_of(n)().needs <= found.available]
    return result, (
        f"{options.output}: {len(found)} layers, {found.metadata.get('sequences', 0):.0f} sequences, "
        f"{size_in_words(found.nbytes)}; serves {', '.join(serves)}"
    )


def _init(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    method = method_of(options)
    calibrated = bool(getattr(method, "calibrated", False))
    if options.dry_run:
        return plan(
            options,
            method.needs,
            steps=getattr(method, "steps", 1),
            searched=calibrated,
            rates=int(bool(options.data)),
        )
    model = start_model(options, method, options.learning_rate)
    save_adapter(model, options.output)
    return _result(options, method, model)


def start_model(
    options: argparse.Namespace, method: Any, learning_rate: float | None = None
) -> PeftModel:
    """The model with its started adapter, as the options say; matched to a learning rate, if one is given."""
    path = getattr(options, "statistics", None)
    statistics = Statistics.load(path) if path else None
    model = get_peft_model(
        load_model(options), lora_config(options), method=method, data=load_data(options),
        statistics=statistics, reference_weights=getattr(options, "reference", None),
        cap_rank=getattr(options, "cap_rank", False), suggest_rate=bool(options.data),
        learning_rate=learning_rate, **sample_arguments(options),
    )  # fmt: skip
    origin = origin_of(model, "default")
    if origin is not None:
        paths = (path, options.data)
        file, records = (str(given) if given else None for given in paths)
        origin = dataclasses.replace(origin, statistics=file, data=records)
        remember(model, "default", origin)
    return model


def _result(
    options: argparse.Namespace, method: Any, model: PeftModel
) -> tuple[dict[str, Any], str]:
    sizes = sizes_of(model)
    origin = origin_of(model, "default")
    anchored = origin is not None and origin.anchored
    refused = None if origin is None else origin.measured.get("refused_loss")
    rate = None if origin is None else origin.measured.get("learning_rate")
    result = {
        "output": options.output,
        "settings": settings_of(method),
        "rank": options.rank,
        "saved_rank": model.peft_config["default"].r,
        "layers": len(sizes),
        "sizes": sizes,
        "plain": refused is not None,
        "learning_rate": rate,
        "lora_alpha": model.peft_config["default"].lora_alpha,
    }
    text = f"{options.output}: {len(sizes)} layers of rank {options.rank}, {options.method}"
    if origin is not None and refused is not None:
        gain = 1 - refused / origin.measured["base_loss"]
        text += f": plain LoRA, the measured start takes {gain:.1%} of the loss away"
    if sizes and max(sizes.values()) > 0:
        text += f", |s B A| / |W| median {stats.median(sizes.values()):.2g}"
    if anchored:
        text += (
            f"; saved at rank {result['saved_rank']}, since the frozen start is subtracted: "
            "outputs are the base model's"
        )
    if rate is not None and options.learning_rate is not None:
        text += (
            f"; matched to the learning rate {rate:.2g}, which 'lorainit train' takes: lora_alpha "
            f"{model.peft_config['default'].lora_alpha:.4g}"
        )
    elif rate is not None:
        text += f"; suggested learning rate {rate:.2g}, which 'lorainit train' takes"
    reference = f" --reference {options.reference}" if options.reference else ""
    text += (
        f"\nnext: lorainit train --model {options.model} --adapter {options.output} --data "
        f"{options.data or 'train.jsonl'} --output trained\n"
        f"or look at it first: lorainit report --model {options.model} --adapter {options.output}{reference}\n"
        f'or in a program of yours: lorainit.load_adapter(model, "{options.output}")'
    )
    return result, text
