"""A slice of the sweep: one architecture for each kind of failure that was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from benchmarks.architectures import starts
from benchmarks.architectures.entry import run_entry
from benchmarks.architectures.outcome import FOREIGN, REFUSED, SAID, STARTS, WRONG, reason
from benchmarks.architectures.tiny.families import entries

import lorainit
from lorainit.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore")

SLICE = [
    ("CAUSAL_LM", "bart"),  # a loss that does not shift
    ("CAUSAL_LM", "jamba"),  # a weight that is read past its layer
    ("CAUSAL_LM", "qwen2_moe"),  # experts, and a gate of one output
    ("SEQUENCE_CLASSIFICATION", "bart"),  # a decoder of the encoder's ids
    ("QUESTION_ANSWERING", "bert"),  # start and end positions
    ("MASKED_LM", "longformer"),  # padding of the model's own
    ("SEQ_TO_SEQ_CAUSAL_LM", "pegasus_x"),  # staggered blocks, and global tokens
    ("SEQ_TO_SEQ_CAUSAL_LM", "fsmt"),  # the length in front
    ("IMAGE_CLASSIFICATION", "siglip"),  # layers that nothing reaches
    ("SPEECH_SEQ_2_SEQ", "speecht5"),  # a decoder whose ids have another name
    ("CTC", "wav2vec2"),  # fewer steps than samples
    ("IMAGE_TEXT_TO_TEXT", "qwen2_vl"),  # patches by a grid
    ("IMAGE_TEXT_TO_TEXT", "gemma3"),  # a mask for the text alone
]


@pytest.mark.parametrize(("family", "name"), SLICE, ids="-".join)
def test_it_starts_as_it_is(family: str, name: str) -> None:
    if not entries([family], [name]):
        pytest.skip("not in this version of transformers")
    record = run_entry(family, name)
    assert record["outcome"] == STARTS, reason(record)
    assert record["batched"]
    said = [*record["numbers"]["said"], *record["numbers"]["said_of_batches"]]
    assert not [line for line in said if SAID in line]


def scaled(collect: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients that are one percent too long."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = collect(*args, **kwargs)
        layers = {
            name: dataclasses.replace(found[name], gradient_sum=found[name].gradient_sum * 1.01)
            for name in found
        }
        return lorainit.Statistics(layers, found.metadata)

    return wrong


def raising(error: Exception) -> Callable[..., Any]:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fails


@pytest.mark.parametrize("outcome", [WRONG, REFUSED, FOREIGN])
def test_what_is_not_right_is_found(outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative controls."""
    if outcome == WRONG:
        right = lorainit.collect_statistics
        monkeypatch.setattr(lorainit, "collect_statistics", scaled(right))
    else:
        error = DataError("no") if outcome == REFUSED else RuntimeError("no")
        monkeypatch.setattr(starts, "start", raising(error))
    assert run_entry("CAUSAL_LM", "gpt2")["outcome"] == outcome
