"""A device's solver libraries loaded beside the first pass, which leaves the host with little to do.

The first decompositions and products of a process load libraries and kernels, which takes about half a
second that no later start takes. A thread with a stream of its own asks for them, by one small solve.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import torch
from torch import Tensor

from lorainit.types import LayerStatistics, Method

logger = logging.getLogger("lorainit")

_SIZE = 768
"""Of the layers: large enough for the ways of large ones, small enough to take no memory to speak of."""

_LAYERS = 2
_RANK = 8

_loaded: set[tuple[torch.device, type]] = set()


@contextmanager
def libraries_loading(method: Method, device: torch.device) -> Iterator[None]:
    """Load what `method` solves with on `device` while the context's work goes on; once in a process."""
    key = device, type(method)
    ours = type(method).__module__.startswith("lorainit.")
    if device.type != "cuda" or not method.needs or not ours or key in _loaded:
        # A method of the user's own is asked for what was collected, and nothing else.
        yield
        return
    _loaded.add(key)
    if not _begun(device):
        yield
        return
    thread = Thread(target=_solve_one, args=(method, device), name="lorainit-warming", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _begun(device: torch.device) -> bool:
    """PyTorch's library of decompositions, loaded by this thread: two at its first use are an error in one."""
    try:
        one = torch.ones(1, 1, device=device)
        torch.linalg.solve_triangular(one, one, upper=False)
    except RuntimeError as error:
        logger.debug("libraries were not loaded ahead: %s", error)
        return False
    return True


def _solve_one(method: Method, device: torch.device) -> None:
    """Solve layers that nobody asked for. What goes wrong here will go wrong, and be told, where it matters."""
    try:
        with torch.no_grad(), torch.cuda.stream(_stream(device)):
            layers = LayerStatistics.stack([_made_up(device).only(method.needs)] * _LAYERS)
            weight = _random(_LAYERS, _SIZE, _SIZE, device=device).bfloat16()
            method.solve(weight, layers, _RANK, 1.0)
    except Exception as error:
        logger.debug("libraries were not loaded ahead: %s", error)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _made_up(device: torch.device) -> LayerStatistics:
    """Falling spectra, as of data."""
    fall = torch.arange(1, _SIZE + 1, device=device).reciprocal()
    return LayerStatistics.from_means(
        gradient=_random(_SIZE, _SIZE, device=device) * fall,
        input_second_moment=torch.diag(fall),
        input_mean=fall.sqrt() / _SIZE,
        output_second_moment=torch.diag(fall),
        population=float(_SIZE),
    )


def _random(*shape: int, device: torch.device) -> Tensor:
    """Drawn on the host by a generator of its own: the user's stays where it is."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)
