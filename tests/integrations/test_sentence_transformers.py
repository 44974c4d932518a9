"""sentence-transformers' own trainer: contrastive losses, saved models, and what is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import BertConfig, BertModel

import lorainit
from tests.adapters import tiny
from tests.life.words import WORDS, tokenizer
from tests.trainers.singles import Recording, distance

pytest.importorskip("sentence_transformers")
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["w1 w2 w3", "w4 w5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bert")
    words = tokenizer()
    words.add_special_tokens({"cls_token": "<u>", "sep_token": "<eos>"})
    words.save_pretrained(place)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=False).save_pretrained(place)
    return place


def embedder(folder: Path) -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inside = Transformer(str(folder))
    return SentenceTransformer(modules=[inside, Pooling(32)], device="cpu")


def trainer(folder: Path, out: Path, model: Any = None, **changes: Any) -> Any:
    if model is None:
        model = embedder(folder)
        model.add_adapter(tiny.config())
    rows = [
        {
            "anchor": " ".join(WORDS[(i + j) % 40] for j in range(3 + i % 3)),
            "positive": " ".join(WORDS[(i + j + 1) % 40] for j in range(2 + i % 4)),
        }
        for i in range(16)
    ]
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 1,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 7,
    }
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**(settings | changes)),
        train_dataset=Dataset.from_list(rows),
        loss=MultipleNegativesRankingLoss(model),
    )


def contrast(scale: float = 20.0) -> Any:
    """In-batch negatives written out: cross-entropy over cosines of mean token vectors, once a pair."""

    def embedded(model: Any, batch: dict[str, Tensor], column: str) -> Tensor:
        mask = batch[f"{column}_attention_mask"]
        hidden = model(
            input_ids=batch[f"{column}_input_ids"], attention_mask=mask
        ).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=1)

    def loss(model: Any, batch: Any) -> Tensor:
        (content,) = batch
        scores = embedded(model, content, "anchor") @ embedded(model, content, "positive").T
        target = torch.arange(len(scores))
        return torch.nn.functional.cross_entropy(scale * scores, target).expand(1) * len(scores)

    return loss


def test_statistics_are_those_of_the_loss_written_out(folder: Path, tmp_path: Path) -> None:
    found = Recording()
    lorainit.start_trainer(trainer(folder, tmp_path), found, progress=False)
    with torch.random.fork_rng(devices=[]):
        batches = list(trainer(folder, tmp_path).get_train_dataloader())
    others = [Recording(), Recording()]
    for recording, data in zip(others, (batches, batches[1:]), strict=True):
        lorainit.get_peft_model(
            BertModel.from_pretrained(folder, add_pooling_layer=False),
            tiny.config(),
            method=recording,
            data=[[batch] for batch in data],
            loss_fn=contrast(),
            progress=False,
        )
    # There a batch of four pairs is one unit, here it counts four.
    for recording in others:
        for index, layer in enumerate(recording.seen):
            recording.seen[index] = replace(layer, sequences=4 * layer.sequences)
    assert distance(found, others[0]) < 1e-5
    assert distance(found, others[1]) > 1e-3


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
def test_training_and_saved_models(kind: str, folder: Path, tmp_path: Path) -> None:
    def run(out: str, resume: Any = None, *, door: bool = True) -> tuple[Any, list[float]]:
        running = trainer(folder, tmp_path / out)
        if door:
            lorainit.start_trainer(running, tiny.METHODS[kind], progress=False)
        running.train(resume_from_checkpoint=resume)
        return running, [e["loss"] for e in running.state.log_history if "loss" in e]

    first, losses = run("door")
    assert run("plain", door=False)[1] != losses
    assert run("again", str(tmp_path / "door" / "checkpoint-1"))[1] == losses
    first.model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    live = first.model.encode(TEXTS)
    numpy.testing.assert_allclose(again.encode(TEXTS), live, rtol=1e-5, atol=2e-6)
    assert abs(embedder(folder).encode(TEXTS) - live).max() > 1e-3
