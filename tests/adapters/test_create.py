"""Creating an adapter's layers: random numbers as after stock PEFT, and nothing left after a failure."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from tests.adapters.tiny import METHODS, config, llama, start
from tests.untouched import untouched

SEED = 5


@pytest.mark.parametrize("name", ["anchored-weight", "displaced"])
def test_the_random_numbers_that_follow_are_those_after_stock_peft(name: str) -> None:
    torch.manual_seed(SEED)
    peft.get_peft_model(llama(), config())
    expected = torch.rand(3), torch.randn(3)
    torch.manual_seed(SEED)
    start(llama(), METHODS[name])
    assert all(map(torch.equal, (torch.rand(3), torch.randn(3)), expected))


def test_an_adapter_that_cannot_be_written_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no room")

    model = llama()
    monkeypatch.setattr("lorainit.adapters.install.put_pair", broken)
    with untouched(model), pytest.raises(RuntimeError, match="no room"):
        start(model, METHODS["anchored-weight"])
