"""lorainit: start a LoRA adapter where the target data says it should.

Names are imported when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lorainit._version import __version__ as __version__

if TYPE_CHECKING:
    from lorainit.adapters.export import ExportReport, export
    from lorainit.adapters.load import load_adapter
    from lorainit.adapters.match_learning_rate import match_learning_rate
    from lorainit.adapters.save import save_adapter
    from lorainit.adapters.serving import serving_objections
    from lorainit.methods import *  # noqa: F403
    from lorainit.methods import __all__ as _methods
    from lorainit.pipeline import (
        LearningRate,
        collect_statistics,
        get_peft_model,
        suggest_learning_rate,
    )
    from lorainit.statistics import CollectSettings, Statistics
    from lorainit.trainers import start_trainer
    from lorainit.types import Factors, LayerStatistics

    __all__ = [
        "CollectSettings",
        "ExportReport",
        "Factors",
        "LayerStatistics",
        "LearningRate",
        "Statistics",
        "__version__",
        "collect_statistics",
        "export",
        "get_peft_model",
        "load_adapter",
        "match_learning_rate",
        "save_adapter",
        "serving_objections",
        "start_trainer",
        "suggest_learning_rate",
    ]
    __all__ += _methods  # type: ignore[has-type]

_HOMES = {
    "CollectSettings": "statistics",
    "ExportReport": "adapters.export",
    "Factors": "types",
    "LayerStatistics": "types",
    "LearningRate": "pipeline",
    "Statistics": "statistics",
    "collect_statistics": "pipeline",
    "export": "adapters.export",
    "get_peft_model": "pipeline",
    "load_adapter": "adapters.load",
    "match_learning_rate": "adapters.match_learning_rate",
    "save_adapter": "adapters.save",
    "serving_objections": "adapters.serving",
    "start_trainer": "trainers",
    "suggest_learning_rate": "pipeline",
}
_MODULES = ("adapters", "calibration", "data", "errors", "linalg", "methods", "report", "types")


def __getattr__(name: str) -> object:
    """Import a public name, or a module of the package, when it is first used."""
    value: object
    if name == "__all__":
        value = [*_HOMES, "__version__", *importlib.import_module("lorainit.methods").__all__]
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"lorainit.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"lorainit.{name}")
    else:
        methods = None if name.startswith("_") else importlib.import_module("lorainit.methods")
        if methods is None or name not in methods.__all__:
            raise AttributeError(f"module 'lorainit' has no attribute {name!r}")
        value = getattr(methods, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__"), *_MODULES})  # type: ignore[misc]
