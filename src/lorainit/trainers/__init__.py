"""Starts from inside a trainer: between building it and ``train()``, on its own batches and its own loss."""

from lorainit.trainers.start import start_trainer

__all__ = ["start_trainer"]
