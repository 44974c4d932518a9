"""The public functions: from a model, a configuration and data to an adapter that is started."""

from lorainit.calibration.learning_rate import LearningRate
from lorainit.pipeline.collect_statistics import collect_statistics
from lorainit.pipeline.get_peft_model import get_peft_model
from lorainit.pipeline.suggest_learning_rate import suggest_learning_rate

__all__ = ["LearningRate", "collect_statistics", "get_peft_model", "suggest_learning_rate"]
