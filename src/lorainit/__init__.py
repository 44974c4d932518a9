"""lorainit: start a LoRA adapter where the target data says it should."""

from lorainit._version import __version__
from lorainit.adapters.export import ExportReport, export, serving_objections
from lorainit.adapters.load import load_adapter
from lorainit.methods import *  # noqa: F403
from lorainit.methods import __all__ as _methods
from lorainit.pipeline import collect_statistics, get_peft_model
from lorainit.statistics import Statistics
from lorainit.types import Factors, LayerStatistics

__all__ = [
    "ExportReport",
    "Factors",
    "LayerStatistics",
    "Statistics",
    "__version__",
    "collect_statistics",
    "export",
    "get_peft_model",
    "load_adapter",
    "serving_objections",
]
__all__ += _methods
