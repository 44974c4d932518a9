"""transformers' own trainers: before and after the optimizer is made, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

import lorainit
from lorainit.adapters.layers import configurations
from lorainit.errors import AdapterError, DataError
from lorainit.trainers import learning_rate
from tests.adapters import tiny
from tests.life import trainer as life
from tests.statistics import models
from tests.trainers.singles import Recording, distance

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = {"displaced": lorainit.LoraDA(), "anchored": lorainit.FILet()}


def build(folder: Path, model: Any = None, *, callbacks: Any = (), **changes: Any) -> Trainer:
    life.seeded()
    model = peft.get_peft_model(tiny.llama(), tiny.config()) if model is None else model
    return Trainer(
        model=model,
        args=life.arguments(folder, **({"save_strategy": "no"} | changes)),
        train_dataset=life.Rows(),
        callbacks=list(callbacks),
    )


def trained(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class _Late(TrainerCallback):
    """A start where some tools have their only hook: after the optimizer was made."""

    def __init__(self, method: Any) -> None:
        self.method, self.trainer = method, None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        lorainit.start_trainer(self.trainer, self.method, progress=False)


@pytest.mark.parametrize("kind", METHODS)
def test_after_the_optimizer_is_made_it_is_written_in_place(kind: str, tmp_path: Path) -> None:
    early = build(tmp_path)
    lorainit.start_trainer(early, METHODS[kind], progress=False)
    late = _Late(METHODS[kind])
    trainer = late.trainer = build(tmp_path, callbacks=[late])
    losses = trained(trainer)
    assert losses == trained(early)
    # The negative control: it does train, and not from PEFT's own start.
    assert losses[-1] < losses[0]
    assert losses != trained(build(tmp_path))


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    copies = [
        p.detach().clone().requires_grad_() for p in trainer.model.parameters() if p.requires_grad
    ]
    trainer.optimizer = torch.optim.SGD(copies, lr=0.1)
    with pytest.raises(AdapterError, match="exists already and does not hold"):
        lorainit.start_trainer(trainer, lorainit.LoraDA(), progress=False)
    trainer.optimizer = None
    trainer.create_optimizer()
    lorainit.start_trainer(trainer, lorainit.LoraDA(), progress=False)


def test_magnitudes_of_dora_are_made_anew_so_an_optimizer_cannot_hold_them(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny.llama(), tiny.config(use_dora=True))
    trainer = build(tmp_path, model)
    trainer.create_optimizer()
    with pytest.raises(AdapterError, match="lora_magnitude_vector"):
        lorainit.start_trainer(trainer, lorainit.LoraDA(), progress=False)


def test_after_a_step_it_is_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(AdapterError, match=r"has taken 1 step"):
        lorainit.start_trainer(trainer, lorainit.LoraDA(), progress=False)


def test_what_cannot_be_started_is_said(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="takes a transformers"):
        lorainit.start_trainer(tiny.llama())
    with pytest.raises(AdapterError, match="has no LoRA adapter yet"):
        lorainit.start_trainer(build(tmp_path, tiny.llama()))
    trainer = build(tmp_path)
    with pytest.raises(AdapterError, match="no LoRA adapter 'other'; it has: default"):
        lorainit.start_trainer(trainer, adapter_name="other")
    with pytest.raises(AdapterError, match="loss must be 'model' or 'trainer'"):
        lorainit.start_trainer(trainer, loss="mean")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="are two losses"):
        lorainit.start_trainer(trainer, loss="model", loss_fn=lambda model, batch: batch)
    with pytest.raises(AdapterError, match="weighs in its own way"):
        lorainit.start_trainer(trainer, loss="trainer", loss_reduction="token")
    trainer.train_dataset = None
    with pytest.raises(DataError, match="has no train_dataset"):
        lorainit.start_trainer(trainer, lorainit.LoraDA())
    # A method without statistics needs no data.
    lorainit.start_trainer(trainer, lorainit.PiSSA())


class _Once(torch.utils.data.IterableDataset[Any]):
    def __init__(self) -> None:
        self.rows = iter(life.Rows())  # type: ignore[call-overload]

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> dict[str, Tensor]:
        return next(self.rows)


def test_a_stream_that_cannot_begin_anew_is_left_to_the_training(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.train_dataset = once = _Once()
    with pytest.raises(DataError, match="gives its samples only once"):
        lorainit.start_trainer(trainer, lorainit.LoraDA())
    assert len(list(once)) == 16


def test_a_trainer_with_a_loss_of_its_own_is_measured_on_it(tmp_path: Path) -> None:
    """Label smoothing, a loss function, a method of a subclass: the trainer's loss; else the model's."""

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            return 3 * super().compute_loss(model, inputs, *args, **kwargs)

    def gradient(trainer: Trainer) -> Recording:
        recording = Recording(frozenset({"gradient"}))
        lorainit.start_trainer(trainer, recording, progress=False)
        return recording

    one = {"per_device_train_batch_size": 1}
    plain = gradient(build(tmp_path, **one))
    own = build(tmp_path, **one)
    own.__class__ = Own
    tripled = gradient(own)
    for a, b in zip(tripled.seen, plain.seen, strict=True):
        torch.testing.assert_close(a.gradient, 3 * b.gradient, rtol=1e-5, atol=1e-7)
    smoothed = gradient(build(tmp_path, label_smoothing_factor=0.5, **one))
    assert float((smoothed.seen[0].gradient - plain.seen[0].gradient).norm()) > 1e-3


def test_max_sequences_and_batches_bound_what_is_read(tmp_path: Path) -> None:
    recording = Recording()
    lorainit.start_trainer(build(tmp_path), recording, max_sequences=6, progress=False)
    assert {int(s.sequences.max()) for s in recording.seen} == {6}  # type: ignore[union-attr]
    recording = Recording()
    lorainit.start_trainer(
        build(tmp_path), recording, loss="trainer", max_sequences=8, progress=False
    )
    assert {int(s.sequences.max()) for s in recording.seen} == {8}  # type: ignore[union-attr]


def test_sequence_to_sequence(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": torch.randint(1, models.VOCABULARY, (6,), generator=generator),
            "labels": torch.randint(1, models.VOCABULARY, (4,), generator=generator),
        }
        for _ in range(8)
    ]
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    trainer = Seq2SeqTrainer(
        model=peft.get_peft_model(models.t5(), config),
        args=Seq2SeqTrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=rows,
    )
    found, expected = Recording(), Recording()
    lorainit.start_trainer(trainer, found, progress=False)
    singles = [{key: value[None] for key, value in row.items()} for row in rows]
    lorainit.get_peft_model(models.t5(), config, method=expected, data=singles, progress=False)
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize(("given", "expected"), [({}, 0.0123), ({"learning_rate": 1e-4}, 1e-4)])
def test_a_suggested_rate_takes_the_place_of_the_default_alone(
    given: dict[str, Any],
    expected: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("lorainit.trainers.start.suggested_rate", lambda model, name: 0.0123)
    caplog.set_level(logging.INFO, logger="lorainit")
    trainer = build(tmp_path, **({"learning_rate": 5e-5} | given))
    lorainit.start_trainer(trainer, lorainit.PiSSA(), progress=False)
    assert trainer.args.learning_rate == expected
    assert "0.0123" in caplog.text
    assert ("set_learning_rate=False" in caplog.text) == (not given)
    assert "warmup_steps is 0" not in caplog.text
    abrupt = build(tmp_path, **({"learning_rate": 5e-5, "warmup_steps": 0} | given))
    lorainit.start_trainer(abrupt, lorainit.PiSSA(), progress=False)
    assert ("warmup_steps is 0" in caplog.text) == (not given)
    left = build(tmp_path, learning_rate=5e-5)
    lorainit.start_trainer(left, lorainit.PiSSA(), set_learning_rate=False, progress=False)
    assert left.args.learning_rate == 5e-5


def test_the_measured_rate_is_given_to_the_trainer(tmp_path: Path) -> None:
    trainer = build(tmp_path, learning_rate=5e-5)
    model = lorainit.start_trainer(trainer, lorainit.LoraDA(), progress=False)
    rate = learning_rate.suggested_rate(model, "default")
    assert rate is not None
    assert trainer.args.learning_rate == rate != 5e-5
    given = build(tmp_path, learning_rate=1e-3)
    model = lorainit.start_trainer(given, lorainit.LoraDA(), progress=False)
    assert learning_rate.suggested_rate(model, "default") is None
    assert given.args.learning_rate == 1e-3


@pytest.mark.parametrize("method", [lorainit.LoraDA(), lorainit.Vanilla()])
def test_an_adapter_is_matched_to_the_trainers_rate(method: Any, tmp_path: Path) -> None:
    """The rate stays, a default one too; a method that reads no data gets some for this."""
    for given in (5e-5, 1e-3):
        trainer = build(tmp_path, learning_rate=given)
        before = configurations(trainer.model)["default"].lora_alpha
        model = lorainit.start_trainer(trainer, method, match_learning_rate=True, progress=False)
        assert trainer.args.learning_rate == given
        assert learning_rate.suggested_rate(model, "default") == given
        origin = configurations(model)["default"].origin
        assert origin.resized != 1
        alpha = configurations(model)["default"].lora_alpha
        assert alpha == pytest.approx(before / origin.resized**2)
        trainer.train()


@pytest.mark.parametrize("kind", ["DPOTrainer", "RewardTrainer", "KTOTrainer"])
def test_of_preferences_no_rate_is_suggested(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A default that stays is warned of; one that the user chose is not."""
    caplog.set_level(logging.INFO, logger="lorainit")
    trainer = build(tmp_path, learning_rate=5e-5)
    trainer.__class__ = type(kind, (type(trainer),), {})
    model = lorainit.start_trainer(trainer, lorainit.LoraDA(), loss="model", progress=False)
    assert learning_rate.suggested_rate(model, "default") is None
    assert trainer.args.learning_rate == 5e-5
    assert "its default, stays" in caplog.text
    caplog.clear()
    given = build(tmp_path, learning_rate=1e-3)
    given.__class__ = type(kind, (type(given),), {})
    lorainit.start_trainer(given, lorainit.LoraDA(), loss="model", progress=False)
    assert "stays" not in caplog.text
    before = {n: p.detach().clone() for n, p in given.model.named_parameters()}
    with pytest.raises(AdapterError, match="match_learning_rate=True wants a learning rate"):
        lorainit.start_trainer(given, loss="model", match_learning_rate=True, progress=False)
    assert all(torch.equal(p, before[n]) for n, p in given.model.named_parameters())
