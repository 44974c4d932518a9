"""One page of pictures and words about statistics and a start."""

from lorainit.report.make import report

__all__ = ["report"]
