"""Lightning's own Trainer: the callback starts what is trained, before its optimizer is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lorainit
from tests.adapters import tiny
from tests.trainers.singles import Recording, distance

pytest.importorskip("lightning")
import lightning.pytorch as pl

from lorainit.integrations.lightning import StartAdapter

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(pl.LightningModule):  # type: ignore[misc,name-defined]
    def __init__(self, model: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = peft.get_peft_model(tiny.llama(), tiny.config()) if model is None else model
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        # Of equal weight for every sequence, as statistics are.
        loss: Tensor = torch.stack(
            [self.model(**_row(batch, i)).loss for i in range(len(batch["labels"]))]
        )
        loss = loss.mean()
        self.log("loss", loss)
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


def _row(batch: Any, index: int) -> dict[str, Tensor]:
    return {key: value[index : index + 1] for key, value in batch.items()}


def loader(rows: int = 4) -> DataLoader[Any]:
    batch = tiny.batch(rows=12)
    examples = [{key: value[i] for key, value in batch.items()} for i in range(12)]
    return DataLoader(examples, batch_size=rows)


def fit(module: Module, folder: Path, callback: Any = None, data: Any = None) -> list[float]:
    pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[] if callback is None else [callback],
    ).fit(module, loader() if data is None else data)
    return module.losses


@pytest.mark.parametrize("loss", ["step", "model"])
def test_statistics_are_those_of_single_examples(loss: str, tmp_path: Path) -> None:
    found, expected, fewer = Recording(), Recording(), Recording()
    fit(Module(), tmp_path, StartAdapter(found, loss=loss, progress=False))
    rows = list(loader(1))
    for recording, data in ((expected, rows), (fewer, rows[1:])):
        lorainit.get_peft_model(
            tiny.llama(), tiny.config(), method=recording, data=data, progress=False
        )
    assert distance(found, expected) < 1e-5
    assert distance(found, fewer) > 1e-3


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
def test_training_is_that_of_the_ready_model(kind: str, tmp_path: Path) -> None:
    method = tiny.METHODS[kind]
    module = Module()
    found = fit(module, tmp_path, StartAdapter(method, loss="model", progress=False))
    found = found[-3:]
    module.model.save_pretrained(tmp_path / "adapter")
    ready = peft.get_peft_model(tiny.llama(), tiny.config())
    lorainit.get_peft_model(ready, None, method=method, data=loader(), progress=False)
    assert fit(Module(ready), tmp_path) == found
    assert fit(Module(), tmp_path) != found
    stock = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(stock), tiny.logits(module.model), rtol=1e-5, atol=2e-6)


def test_a_module_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lorainit.errors.AdapterError, match="holds no model with a LoRA adapter"):
        fit(Module(tiny.llama()), tmp_path, StartAdapter(lorainit.LoraDA()))
