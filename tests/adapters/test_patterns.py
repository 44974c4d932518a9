"""Ranks of single layers: the same after PEFT has sorted the patterns into its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

import lorainit
from lorainit.adapters.patterns import with_ranks
from lorainit.errors import RankError
from tests.adapters.tiny import METHODS, batch, config, llama, logits, train


def shapes(model: PeftModel) -> dict[str, tuple[int, float]]:
    return {
        name: (layer.r["default"], layer.scaling["default"])
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        # A key that sorts before '^', and one that sorts after.
        {"rank_pattern": {".*k_proj": 20, "q_proj": 6}},
        {"rank_pattern": {"(k|v)_proj": 20}, "alpha_pattern": {".*proj": 12}},
    ],
    ids=str,
)
def test_capped_ranks_reload(
    kind: str, rslora: bool, patterns: dict[str, Any], tmp_path: Path
) -> None:
    """k_proj and v_proj have 16 rows: their rank of 20 is lowered at the same scaling."""
    lora = config(
        r=20,
        lora_alpha=40,
        use_rslora=rslora,
        target_modules=["q_proj", "k_proj", "v_proj", "embed_tokens"],
        **patterns,
    )
    arguments: dict[str, Any] = {
        "method": METHODS[kind],
        "data": [batch()],
        "progress": False,
    }
    with pytest.raises(RankError, match="cap_rank"):
        lorainit.get_peft_model(llama(), lora, on_unused="raise", **arguments)
    wrapped = lorainit.get_peft_model(llama(), lora, cap_rank=True, **arguments)
    found = shapes(wrapped)
    factor = 2 if kind == "anchored" else 1
    for name, (rank, scaling) in found.items():
        configured = 6 if "q_proj" in name and "rank_pattern" in patterns else 20
        if name.endswith(("k_proj", "v_proj")):
            assert rank == 16 * factor
            # The cap keeps the scaling that was asked for.
            alpha = 12 if "alpha_pattern" in patterns else 40
            assert scaling == pytest.approx(alpha / 20**0.5 if rslora else alpha / 20)
        elif not name.endswith("embed_tokens") and "alpha_pattern" not in patterns:
            assert rank == configured * factor
    train(wrapped)
    wrapped.save_pretrained(tmp_path)
    for again in (
        PeftModel.from_pretrained(llama(), tmp_path),
        lorainit.load_adapter(llama(), tmp_path),
    ):
        assert shapes(again) == {n: (r, pytest.approx(s)) for n, (r, s) in found.items()}
        torch.testing.assert_close(logits(again), logits(wrapped), rtol=1e-5, atol=2e-6)


def test_other_layers_keep_what_a_broad_pattern_gave_them() -> None:
    lora = LoraConfig(r=4, lora_alpha=8, rank_pattern={".*_proj": 2}, alpha_pattern={"b_proj": 3})
    with_ranks(lora, {"x.a_proj": 3}, ["x.a_proj", "x.b_proj", "x.other"])
    assert lora.rank_pattern == {r"^x\.a_proj": 3, r"^x\.b_proj": 2}
    # Scalings as PEFT computes them from the patterns: 8 / 2 and 3 / 2.
    assert lora.alpha_pattern == {r"^x\.a_proj": 12, r"^x\.b_proj": 3}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [{}, {"alpha_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 2, "up_proj": 6}}],
    ids=str,
)
def test_redistributed_ranks_keep_every_scaling(rslora: bool, patterns: dict[str, Any]) -> None:
    """Against the scalings that PEFT gives the same configuration (CASES C3)."""
    lora = config(use_rslora=rslora, **patterns)
    stock = shapes(peft.get_peft_model(llama(), lora))
    found = shapes(
        lorainit.get_peft_model(
            llama(), lora, method=lorainit.EVA(rho=2.0), data=[batch()], progress=False
        )
    )
    assert {n: r for n, (r, _) in found.items()} != {n: r for n, (r, _) in stock.items()}
    assert {n: s for n, (_, s) in found.items()} == pytest.approx(
        {n: s for n, (_, s) in stock.items()}
    )
    if patterns:
        assert len(set(stock.values())) > 1
