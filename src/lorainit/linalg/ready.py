"""A CUDA device's libraries for decompositions, loaded while it does something else."""

from __future__ import annotations

import threading

import torch


def load_solvers(device: torch.device) -> None:
    """Begin to load what factors and decomposes on a CUDA device; nothing on others.

    The first factorization of a process waits for its library otherwise, two thirds of a second on an
    H200. A pass over data keeps the device busy and the host idle, so a thread does it meanwhile.
    """
    if device.type == "cuda":
        threading.Thread(target=_touch, args=(device,), name="lorainit-solvers").start()


def _touch(device: torch.device) -> None:
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(aside):
        small = torch.eye(32, dtype=torch.float64, device=device).repeat(2, 1, 1)
        torch.linalg.cholesky_ex(small[0])
        torch.linalg.eigh(small)
        torch.linalg.solve_triangular(small, small, upper=False)
