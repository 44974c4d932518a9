"""Starts in threads give what one after the other gives, and nothing stays patched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lorainit
from tests.adapters import tiny

METHODS: list[Callable[[], Any]] = [lorainit.PiSSA, lorainit.LoraDA, lorainit.OLoRA, lorainit.EVA]


def begun(model: Any, number: int, name: str = "default") -> Any:
    return lorainit.get_peft_model(
        model,
        tiny.config(),
        method=METHODS[number % 4](),
        data=[tiny.batch(seed=number)],
        adapter_name=name,
        progress=False,
    )


def factors(model: Any, name: str = "default") -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters() if f".{name}." in k}


def classes() -> dict[str, Any]:
    """What a patch for the whole process would change."""
    return {k: v for kind in (nn.Module, nn.Linear) for k, v in vars(kind).items() if callable(v)}


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(works)
    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            results[number] = works[number]()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    return results


@pytest.mark.parametrize("repeat", range(2))
def test_several_models(repeat: int) -> None:
    expected = [factors(begun(tiny.llama(seed=n), n)) for n in range(4)]
    before = classes()
    # The random weights are drawn from one generator: before the threads.
    models = [tiny.llama(seed=n) for n in range(4)]
    found = in_threads([lambda n=n: begun(models[n], n) for n in range(4)])
    assert classes() == before
    for model, wanted in zip(found, expected, strict=True):
        have = factors(model)
        assert have.keys() == wanted.keys()
        for key, value in wanted.items():
            assert not have[key].is_meta
            torch.testing.assert_close(have[key], value, rtol=0, atol=0)


def test_one_model() -> None:
    """Adapters of other names on one PeftModel, and statistics of its base meanwhile."""

    def fresh() -> Any:
        return begun(tiny.llama(), 0)

    def measured(model: Any) -> lorainit.Statistics:
        return lorainit.collect_statistics(
            model, tiny.config(), data=[tiny.batch()], needs={"gradient"}, progress=False
        )

    alone = fresh()
    sums = measured(alone)
    for number in range(1, 4):
        begun(alone, number, f"a{number}")
    model = fresh()
    works: list[Callable[[], Any]] = [lambda n=n: begun(model, n, f"a{n}") for n in range(1, 4)]
    found = in_threads([*works, lambda: measured(model)])[-1]
    for number in range(1, 4):
        have, wanted = factors(model, f"a{number}"), factors(alone, f"a{number}")
        assert have.keys() == wanted.keys()
        assert all(torch.equal(have[key], wanted[key]) for key in wanted)
    assert all(torch.equal(found[n].gradient, sums[n].gradient) for n in sums)


def test_the_seed_of_a_model_tells() -> None:
    """The negative control: other data and another model give another start."""
    first, second = (factors(begun(tiny.llama(seed=n), 1)) for n in range(2))
    assert any(not torch.equal(first[key], second[key]) for key in first)
