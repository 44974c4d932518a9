"""The package from the shell: ``lorainit --help``."""

from lorainit.cli.main import main

__all__ = ["main"]
