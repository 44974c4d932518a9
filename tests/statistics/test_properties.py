"""Whatever the shapes, dtypes and masks: the statistics of a layer are the dense float64 ones."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor, nn

import lorainit

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Inputs are the same numbers in both, and their products are summed wide; gradients are rounded on
# their way back.
GRAM = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
BACK = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}


class Pooled(nn.Module):
    """A layer whose outputs are averaged over the positions that attend."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.layer.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        kept = attention_mask.to(x.dtype)
        return (self.layer(x) * kept[..., None]).sum(1) / kept.sum(1, keepdim=True).clamp_min(1)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    cells = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    mask = torch.tensor(cells).reshape(rows, length)
    # A row of padding alone is no sequence.
    mask[:, 0] |= ~mask.any(1)
    return mask


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    mask=masks(),
    columns=st.integers(1, 7),
    outputs=st.integers(2, 5),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1.0, 300.0]),
    split=st.booleans(),
    seed=st.integers(0, 99),
)
def test_statistics_of_any_shape_dtype_and_mask(
    mask: Tensor,
    columns: int,
    outputs: int,
    dtype: torch.dtype,
    size: float,
    split: bool,
    seed: int,
) -> None:
    """Squares of 300 are beyond float16, and so is every Gram matrix of such inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(*mask.shape, columns, generator=generator).sign() * size).to(dtype)
    x = x * torch.rand(x.shape, generator=generator).add(0.5).to(dtype)
    weight = (torch.randn(outputs, columns, generator=generator) / size).to(dtype)
    labels = torch.randint(outputs, (len(mask),), generator=generator)
    data = {"x": x, "attention_mask": mask.long(), "labels": labels}
    parts = [{k: v[i : i + 1] for k, v in data.items()} for i in range(len(mask))]
    found = lorainit.collect_statistics(
        Pooled(weight),
        LoraConfig(r=1, target_modules=["layer"]),
        data=parts if split else [data],
        needs=["gradient", "input_second_moment", "input_mean", "output_second_moment"],
        progress=False,
    )["layer"]

    wide, true = Pooled(weight.double()), x.double()
    shift = torch.zeros(*mask.shape, outputs, dtype=torch.float64, requires_grad=True)
    kept = mask.double()
    means = ((wide.layer(true) + shift) * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
    loss = nn.functional.cross_entropy(means, labels, reduction="sum")
    gradient, g = torch.autograd.grad(loss, [wide.layer.weight, shift])
    rows, back = true[mask], g[mask]
    for name, expected, tolerance in (
        ("input_second_moment", rows.mT @ rows / len(rows), GRAM[dtype]),
        ("input_mean", rows.mean(0), GRAM[dtype]),
        ("gradient", gradient / len(mask), BACK[dtype]),
        ("output_second_moment", back.mT @ back / len(back), BACK[dtype]),
    ):
        value = getattr(found, name)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # Of means, what matters is how large their terms are; of gradients, those of the layer.
        scale = float(rows.abs().max()) if name == "input_mean" else float(expected.norm())
        if name == "gradient":
            scale = float((g.norm() * true.norm()) / len(mask))
        assert float((value.double() - expected).norm()) <= tolerance * scale + 1e-7, name
    assert found.positions == int(mask.sum())
    assert found.sequences == len(mask)
