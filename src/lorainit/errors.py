"""Errors of the package. Each names the layer or the file, and the remedy."""


class LorainitError(Exception):
    """Base of every error that this package raises on purpose."""


class TargetError(LorainitError, ValueError):
    """The adapter's configuration targets nothing, or something that cannot be served."""


class RankError(LorainitError, ValueError):
    """A rank that the layer cannot have."""


class DataError(LorainitError, ValueError):
    """The batches cannot give statistics: none, no labels, wrong keys."""


class NonFiniteError(LorainitError, ValueError):
    """A loss, gradient, weight or statistic is not finite."""


class MissingStatisticError(LorainitError, ValueError):
    """A method needs a statistic that was not collected."""


class StatisticsFileError(LorainitError, ValueError):
    """A statistics file is truncated, foreign, or was made for something else."""


class MemoryPlanError(LorainitError, ValueError):
    """The allowed memory is too small for even one layer at a time."""


class FactorizationError(LorainitError, ValueError):
    """A matrix could not be factored, even in higher precision."""


class AdapterError(LorainitError, ValueError):
    """An adapter cannot be installed, exported or reloaded as asked."""


class MissingExtraError(LorainitError, ImportError):
    """Something was asked for that needs a package which is not among the required ones."""


class ProcessError(LorainitError, RuntimeError):
    """Another process of the group failed, so this one stops too."""


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
