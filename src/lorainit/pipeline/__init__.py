"""The public functions: from a model, a configuration and data to an adapter that is started."""

from lorainit.pipeline.collect_statistics import collect_statistics
from lorainit.pipeline.get_peft_model import get_peft_model

__all__ = ["collect_statistics", "get_peft_model"]
