"""Collect, start, train, save, reload: the models that people adapt, through the real libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import lorainit
from tests.adapters.tiny import METHODS, assert_same_bits, base_weights, config
from tests.life.architectures import CASES

pytestmark = pytest.mark.filterwarnings("ignore")


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(**batch).logits


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
@pytest.mark.parametrize("name", CASES)
def test_the_straight_line(name: str, kind: str, tmp_path: Path) -> None:
    case = CASES[name]
    batch = case.data()
    base = case.build()
    before, expected = base_weights(base), outputs(base, batch)
    wrapped = lorainit.get_peft_model(
        base,
        config(r=2, **case.changes),
        method=METHODS[kind],
        data=[batch],
        progress=False,
    )
    assert wrapped.peft_config["default"].target_modules
    found = outputs(wrapped, batch)
    if kind == "anchored":
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    else:
        assert not torch.allclose(found, expected, atol=1e-6)
    started = [n for n, p in wrapped.named_parameters() if "lora_B" in n and bool((p != 0).any())]
    total = [n for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert len(started) == len(total) > 0, set(total) - set(started)

    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    wrapped(**batch).loss.backward()
    optimizer.step()
    live = outputs(wrapped, batch)
    assert not torch.equal(live, found)
    assert_same_bits(before, base_weights(wrapped))

    wrapped.save_pretrained(tmp_path)
    for loaded in (
        PeftModel.from_pretrained(case.build(), tmp_path),
        lorainit.load_adapter(case.build(), tmp_path),
    ):
        torch.testing.assert_close(outputs(loaded, batch), live, rtol=1e-5, atol=2e-6)
    lorainit.export(wrapped, tmp_path / "exported")
    exported = PeftModel.from_pretrained(case.build(), tmp_path / "exported")
    torch.testing.assert_close(outputs(exported, batch), live, rtol=1e-5, atol=2e-6)
    if not case.changes:
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(outputs(merged, batch), live, rtol=1e-5, atol=2e-6)


def test_a_model_that_peft_itself_refuses_is_as_it_was() -> None:
    """PEFT adapts the head as a layer, then finds that it cannot keep it whole as well."""
    case = CASES["bert-tags"]
    base = case.build()
    names, before = [n for n, _ in base.named_modules()], base_weights(base)
    with pytest.raises(TypeError, match="modules_to_save"):
        lorainit.get_peft_model(
            base,
            config(r=2, task_type="TOKEN_CLS"),
            method=METHODS["displaced"],
            data=[case.data()],
            progress=False,
        )
    assert [n for n, _ in base.named_modules()] == names
    assert_same_bits(before, base_weights(base))
    assert all(p.requires_grad for p in base.parameters())
