"""Starts by lorainit's public interface, for the trainer: statistics once, then every method."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

import lorainit
from benchmarks.quality.data.order import training_rows
from benchmarks.quality.data.pools import Pool
from benchmarks.quality.experiment import GRID, Experiment
from benchmarks.quality.models.registry import kind_of
from benchmarks.quality.training.adapters import Start
from lorainit.calibration.fit_heads import PART
from lorainit.pipeline.heads import TIMES_AS_MANY

RANDOM = frozenset({"vanilla", "gaussian", "orthogonal"})
"""Methods that draw their start; of the others, those that read no data have one start."""


def lora_config(experiment: Experiment) -> LoraConfig:
    return LoraConfig(
        r=experiment.rank,
        lora_alpha=experiment.alpha,
        use_rslora=experiment.rslora,
        **kind_of(experiment.model).adapter(),
    )


def start_of(model: PeftModel, adapter_name: str = "default") -> Start:
    """The adapter of a PeftModel as plain tensors."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    anchors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in model.get_base_model().named_modules():
        if adapter_name not in getattr(layer, "lora_A", {}):
            continue
        down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        a, b = down.weight.detach(), up.weight.detach()
        if hasattr(down, "anchor"):
            # To PEFT an anchored pair is [A; A0], [B, -B0].
            (a, a0), (b, b0) = a.chunk(2, 0), b.chunk(2, 1)
            anchors[name] = (a0.clone(), -b0)
        factors[name] = (a.clone(), b.clone())
    extras = {
        f"{name}.{key}": value.detach().clone()
        for name, module in model.get_base_model().named_modules()
        for key, value in getattr(module, "modules_to_save", {}).items()
        for key, value in value.named_parameters()
    }
    return Start(factors, anchors, extras)


def take_out(wrapped: PeftModel, model: nn.Module) -> None:
    """The base as it was before the adapter.

    PEFT's ``unload`` leaves the adapter's copies of heads in the places of the base's own, and marks the base.
    """
    heads = {
        name: module.original_module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    wrapped.unload()
    for name, head in heads.items():
        model.set_submodule(name, head)
    if hasattr(model, "peft_config"):
        del model.peft_config


@dataclass(frozen=True, eq=False)
class Initialised:
    """A start and what it took.

    Attributes:
        start: the factors.
        collect_seconds: of the statistics; where methods shared them, of the union of their needs.
        solve_seconds: the call of ``get_peft_model``: all of it for methods that get the data.
        suggested: the learning rate that suits a start which is matched to another, as it was configured.
    """

    start: Start
    collect_seconds: float
    solve_seconds: float
    suggested: float | None = None

    @property
    def seconds(self) -> float:
        return self.collect_seconds + self.solve_seconds


class Initialiser:
    """Starts of experiments on one base model; statistics and repeated solutions are kept.

    Args:
        model: the base; it is as it was after every call.
        batch_size: of the collection.
        reference: what a quantized base was before, for experiments that ask for it.
    """

    def __init__(
        self, model: nn.Module, *, batch_size: int = 32, reference: nn.Module | None = None
    ) -> None:
        self.model, self.batch_size, self.reference = model, batch_size, reference
        self.device = next(model.parameters()).device
        self._statistics: dict[Any, tuple[lorainit.Statistics, float]] = {}
        self._solved: dict[Any, Initialised] = {}

    def forget(self) -> None:
        """Drop what belongs to one task's data; starts that read no data stay."""
        self._statistics.clear()
        self._solved = {k: v for k, v in self._solved.items() if k[-1] is None}

    def batches(
        self, experiment: Experiment, train: Pool, times: int = 1
    ) -> list[dict[str, Tensor]]:
        """The first ``statistics_samples`` of the sequences that will be trained on, or `times` as many."""
        samples = min(times * experiment.statistics_samples, experiment.train_samples)
        rows = training_rows(len(train), experiment.train_samples, experiment.seed)[:samples]
        return train.batches(rows.tolist(), self.batch_size)

    def __call__(
        self, experiment: Experiment, train: Pool, together: Sequence[Experiment] = ()
    ) -> Initialised:
        """The start of an experiment.

        Args:
            experiment: what is started.
            train: the pool of its task.
            together: experiments that its statistics should serve too.
        """
        key = self._key(experiment)
        if key in self._solved:
            return self._solved[key]
        method = experiment.build_method()
        kind_of(experiment.model).seed_head(self.model, experiment.seed)
        config = lora_config(experiment)
        collected, seconds = None, 0.0
        matched = bool(experiment.settings.get("matched"))
        arguments: dict[str, Any] = {"suggest_rate": True} if matched else {}
        part = experiment.settings.get("fitted", PART)
        arguments["fit_heads"] = bool(part)
        if self._given_data(experiment, method):
            # The start takes as many as it may; heads beside it are fitted on more.
            arguments["data"] = self.batches(experiment, train, TIMES_AS_MANY)
            arguments["max_sequences"] = experiment.statistics_samples
        elif method.needs:
            collected, seconds = self._collect(experiment, train, together)
            arguments["statistics"] = collected
        if experiment.settings.get("reference"):
            if self.reference is None:
                raise ValueError(f"{experiment.model} is not quantized: it has no reference")
            arguments["reference_weights"] = self.reference
        torch.manual_seed(experiment.seed)
        self._wait()
        began = time.perf_counter()
        with mock.patch("lorainit.pipeline.heads.PART", PART if part is True else part):
            wrapped = lorainit.get_peft_model(
                self.model, config, method=method, progress=False, **arguments
            )
        self._wait()
        took = time.perf_counter() - began
        try:
            if matched:
                self._solved |= self._matched(experiment, wrapped, took)
            else:
                self._solved[key] = Initialised(start_of(wrapped), seconds, took)
        finally:
            take_out(wrapped, self.model)
        return self._solved[key]

    def _matched(
        self, experiment: Experiment, wrapped: PeftModel, took: float
    ) -> dict[Any, Initialised]:
        """One start resized for every rate of the grid, and for the experiment's; its own factors change."""
        config = wrapped.peft_config["default"]
        suggested = config.origin.measured.get("learning_rate")
        alpha, suits = config.lora_alpha, suggested
        found = {}
        for rate in {*GRID, experiment.learning_rate}:
            if suits is not None:
                suits *= lorainit.match_learning_rate(wrapped, suits, rate)
            ratio = wrapped.peft_config["default"].lora_alpha / alpha
            start = replace(start_of(wrapped), ratio=ratio)
            made = Initialised(start, 0.0, took, suggested)
            found[self._key(experiment.at(learning_rate=rate))] = made
        return found

    @staticmethod
    def _given_data(experiment: Experiment, method: Any) -> bool:
        """Whether ``get_peft_model`` gets the batches: for a rate, for heads, or because the method asks."""
        asked = any(experiment.settings.get(name) for name in ("matched", "fitted"))
        return asked or experiment.wants_data(method)

    def _key(self, experiment: Experiment) -> tuple[Any, ...]:
        """What a start depends on; its last part is None where it reads no data."""
        method = experiment.build_method()
        fresh = experiment.method in RANDOM or kind_of(experiment.model).fresh_head
        matched = bool(experiment.settings.get("matched"))
        reads = bool(method.needs) or self._given_data(experiment, method)
        return (
            experiment.label,
            experiment.learning_rate if matched else None,
            experiment.rank,
            experiment.alpha,
            experiment.rslora,
            experiment.seed if fresh else None,
            self._data_key(experiment) if reads else None,
        )

    def _data_key(self, experiment: Experiment) -> tuple[Any, ...]:
        samples = (experiment.statistics_samples, experiment.train_samples)
        return (experiment.task, experiment.seed, samples)

    def _collect(
        self,
        experiment: Experiment,
        train: Pool,
        together: Sequence[Experiment],
    ) -> tuple[lorainit.Statistics, float]:
        key = self._data_key(experiment)
        if key not in self._statistics:
            needs = set(experiment.build_method().needs)
            for other in together:
                method = other.build_method()
                if not other.wants_data(method):
                    needs |= set(method.needs)
            self._wait()
            began = time.perf_counter()
            statistics = lorainit.collect_statistics(
                self.model,
                lora_config(experiment),
                data=self.batches(experiment, train),
                needs=needs,
                max_sequences=None,
                progress=False,
            )
            self._wait()
            self._statistics.clear()
            self._statistics[key] = (statistics, time.perf_counter() - began)
        return self._statistics[key]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
