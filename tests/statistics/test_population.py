"""How many samples there are to fine-tune on: read from the loader, whatever part of it is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import lorainit
from tests.statistics import models
from tests.statistics.models import all_linear, batches, sequences

ROWS = 40
RUN = 8


def loader() -> DataLoader[Any]:
    rows = batches(sequences(ROWS), ROWS)[0]
    records = [{key: value[i] for key, value in rows.items()} for i in range(ROWS)]
    return DataLoader(records, batch_size=4)  # type: ignore[arg-type]


class Endless(IterableDataset[Any]):
    """Its length is not known."""

    def __iter__(self) -> Any:
        return iter(loader().dataset)


def directions(data: Any, **settings: Any) -> torch.Tensor:
    """The projector on one layer's ``A``: a measured length may be zero, and leaves no other trace."""
    scale = settings.pop("scale")
    method = lorainit.LoraDA(scale=scale, beta=30.0, **settings)
    model = lorainit.get_peft_model(
        models.llama(), all_linear(), method=method, data=data, max_sequences=RUN, progress=False
    )
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    basis = torch.linalg.qr(layer.lora_A["default"].weight.detach().double().mT).Q
    return basis @ basis.mT


@pytest.mark.parametrize(
    ("data", "expected"), [(loader(), ROWS), (list(loader()), None), (DataLoader(Endless()), None)]
)
def test_statistics_know_it_where_the_loader_does(data: Any, expected: int | None) -> None:
    found = lorainit.collect_statistics(
        models.llama(),
        all_linear(),
        data=data,
        needs=["gradient"],
        max_sequences=RUN,
        progress=False,
    )
    assert found.metadata["population"] == expected
    for layer in found.values():
        assert layer.population == expected
        assert layer.sequences == RUN


@pytest.mark.parametrize("scale", [None, "calibrated"])
def test_a_start_reads_it_from_the_loader(scale: str | None) -> None:
    """Also where some sequences are held back, and lists of batches are what is run."""
    scale = scale or lorainit.LoraDA().scale
    found = directions(loader(), scale=scale)
    told = directions(list(loader()), scale=scale, population=ROWS)
    torch.testing.assert_close(found, told, rtol=0, atol=1e-5)
    untold = directions(list(loader()), scale=scale)
    assert float((untold - told).norm()) > 1e-2
