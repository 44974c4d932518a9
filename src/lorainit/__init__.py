"""lorainit: start a LoRA adapter where the target data says it should."""

from lorainit._version import __version__
from lorainit.adapters.load import load_adapter
from lorainit.methods import *  # noqa: F403
from lorainit.methods import __all__ as _methods
from lorainit.pipeline import collect_statistics, get_peft_model
from lorainit.statistics import Statistics
from lorainit.types import Factors, LayerStatistics

__all__ = [
    "Factors",
    "LayerStatistics",
    "Statistics",
    "__version__",
    "collect_statistics",
    "get_peft_model",
    "load_adapter",
]
__all__ += _methods
