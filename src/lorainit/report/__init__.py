"""One page of pictures and words about statistics and a start."""

from lorainit.report.curves import Curve, read_curves
from lorainit.report.make import report
from lorainit.report.rate_curve import RateCurve, read_rate_curves
from lorainit.report.start_loss import StartLoss

__all__ = ["Curve", "RateCurve", "StartLoss", "read_curves", "read_rate_curves", "report"]
