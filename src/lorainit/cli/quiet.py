"""Importing what torch finds installed, without its complaints."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any


def quiet_import(name: str) -> Any:
    """A module; optional libraries that it pulls in may complain about themselves, not here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        logging.disable(before)
