"""lorainit: start a LoRA adapter where the target data says it should."""

from lorainit._version import __version__

__all__ = ["__version__"]
