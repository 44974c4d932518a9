"""References of peers, written independently: numpy, torch.fft, loops in the form of the authors' code."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from lorainit.methods import FARSS, Astra, CGLoRA, GoRA, InitAB, LoRAM, LoraOne
from lorainit.types import LayerStatistics
from tests.methods.common import IN, OUT, RANK, SCALING, Check, angle, layer, relative, solve

WEIGHT, STATISTICS = layer()
TOKENS = torch.randn(
    60, IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64
) * 0.8 ** torch.arange(IN)


def of_tokens(tokens: Tensor) -> LayerStatistics:
    return LayerStatistics(input_second_moment_sum=tokens.mT @ tokens, positions=len(tokens))


def astra_from_outputs(select: str) -> float:
    """Singular vectors of the outputs themselves, by numpy; the inputs' moment is never formed."""
    outputs = (TOKENS @ WEIGHT.mT).numpy()
    rows = np.linalg.svd(outputs, full_matrices=False)[2]
    kept = torch.from_numpy(rows[:RANK] if select == "highest" else rows[-RANK:])
    found = solve(Astra(select), WEIGHT, of_tokens(TOKENS))  # type: ignore[arg-type]
    return angle(found.B, kept.mT) + relative(found.B @ found.A, kept.mT @ kept @ WEIGHT)


def astra_of_the_release() -> float:
    """Its moment divides every call by its signed maximum: with calls of unlike size, another one."""
    calls = TOKENS[:20], 3.0 * TOKENS[20:]
    outputs = [call @ WEIGHT.mT for call in calls]
    moment = sum((y / y.max().abs()).mT @ (y / y.max().abs()) for y in outputs) / 2
    assert isinstance(moment, Tensor)
    theirs = torch.linalg.eigh(moment)[1][:, -RANK:]
    found = solve(Astra(), WEIGHT, of_tokens(torch.cat(calls)))
    return angle(found.B, theirs)


def farss_of_the_release(rank: int, highest_from: int) -> float:
    """Scores, choice by numpy's sort, and factors, as its ``initialize_lora_layer`` forms them."""
    u, s, vh = np.linalg.svd(WEIGHT.numpy(), full_matrices=False)
    sx = STATISTICS.input_second_moment.numpy()
    sy = STATISTICS.output_second_moment.numpy()
    scores = [s[k] ** 2 * (vh[k] @ sx @ vh[k]) * (u[:, k] @ sy @ u[:, k]) for k in range(OUT)]
    order = np.argsort(scores)
    kept = np.sort(order[:rank] if rank < highest_from else order[::-1][:rank])
    b = torch.from_numpy(u[:, kept] * np.sqrt(s[kept]))
    a = torch.from_numpy(np.sqrt(s[kept])[:, None] * vh[kept])
    found = solve(FARSS(highest_from=highest_from), WEIGHT, STATISTICS, rank=rank)
    return relative(found.B.abs(), b.abs()) + relative(found.B @ found.A, b @ a)


def loram_by_fft() -> float:
    """The sine transform of unit vectors by an FFT of their odd extensions, and the paper's beta."""
    bases = []
    for size in (IN, OUT):
        odd = torch.zeros(RANK, 2 * (size + 1), dtype=torch.float64)
        for k in range(RANK):
            odd[k, k + 1], odd[k, -k - 1] = 1.0, -1.0
        sines = -torch.fft.fft(odd).imag[:, 1 : size + 1] / 2
        bases.append(sines * math.sqrt(2 / (size + 1)))
    inner, outer = bases
    magnitude = WEIGHT.square().mean()
    gain = math.log(RANK) / math.log(min(IN, OUT))
    beta = (gain * magnitude / (outer.mT @ inner).square().mean()) ** 0.25
    found = solve(LoRAM(), WEIGHT, STATISTICS)
    return relative(found.A, beta * inner) + relative(found.B, beta * outer.mT)


def init_ab_first_factor() -> float:
    """``A`` is what torch's own Kaiming initialization draws, as LoRA's is."""
    torch.manual_seed(0)
    theirs = nn.init.kaiming_uniform_(torch.empty(RANK, IN, dtype=torch.float64), a=math.sqrt(5))
    return relative(solve(InitAB(), WEIGHT, STATISTICS).A, theirs)


def gora_of_the_release(sign: float) -> float:
    """Its ``grad_compress_init`` under rsLoRA and ``scaling_by_lr``, by numpy's pseudoinverse."""
    torch.manual_seed(0)
    a = nn.init.kaiming_uniform_(torch.empty(RANK, IN, dtype=torch.float64), a=math.sqrt(5))
    gradient, rows = STATISTICS.gradient.numpy(), a.numpy()
    alpha = SCALING * math.sqrt(RANK)
    gamma = 0.05 / math.sqrt(RANK / IN) * math.sqrt(RANK)
    inverse = np.linalg.pinv(rows @ rows.T + 1e-8 * np.eye(RANK))
    b = torch.from_numpy(sign * gradient @ rows.T @ inverse * gamma / alpha)
    found = solve(GoRA(), WEIGHT, STATISTICS)
    return relative(found.A, a) + relative(found.B, b)


def cg_lora_of_white_factors() -> float:
    """Where neither factor has a direction it is LoRA-One."""
    white = LayerStatistics.from_means(
        gradient=STATISTICS.gradient,
        input_second_moment=3.0 * torch.eye(IN, dtype=torch.float64),
        output_second_moment=0.2 * torch.eye(OUT, dtype=torch.float64),
    )
    ours, theirs = (solve(m, WEIGHT, white) for m in (CGLoRA(), LoraOne()))
    return relative(ours.A.abs(), theirs.A.abs()) + relative(ours.B @ ours.A, theirs.B @ theirs.A)


PEERS = [
    Check("astra", "outputs' singular vectors", 1e-8, lambda: astra_from_outputs("highest")),
    Check("astra", "the last ones", 1e-6, lambda: astra_from_outputs("lowest")),
    Check("astra", "the release's moment is another", 1e-2, astra_of_the_release, control=True),
    Check("farss", "release's formula, lowest", 1e-10, lambda: farss_of_the_release(RANK, 128)),
    Check("farss", "release's formula, highest", 1e-10, lambda: farss_of_the_release(RANK, RANK)),
    Check("loram", "paper's formula, by FFT", 1e-10, loram_by_fft),
    Check("init-ab", "torch's draw", 1e-12, init_ab_first_factor),
    Check("gora", "release's formula, minus sign", 1e-6, lambda: gora_of_the_release(-1.0)),
    Check("gora", "control: its sign", 1.0, lambda: gora_of_the_release(1.0), control=True),
    Check("cg-lora", "LoRA-One of white factors", 1e-8, cg_lora_of_white_factors),
]
