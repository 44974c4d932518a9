"""A real model on real prompts, where the authors' own damping leaves the input moment singular.

Short prompts of one task hold far fewer distinct directions than a layer has inputs; that of three blocks
is enough to show it.
"""

from __future__ import annotations

import pytest
import torch
from benchmarks.common.models import load_smollm2, load_smollm2_tokenizer
from benchmarks.common.tasks import Collator, batches, make_examples
from peft import LoraConfig
from torch import Tensor

import lorainit
from lorainit.errors import FactorizationError
from tests.untouched import untouched

pytestmark = pytest.mark.slow

CONFIG = LoraConfig(
    r=8,
    lora_alpha=16,
    use_rslora=True,
    target_modules=["q_proj", "down_proj"],
    layers_to_transform=[20, 25, 29],
)
PUBLISHED_DAMPING = 1e-6


@pytest.fixture(scope="module")
def data() -> list[dict[str, Tensor]]:
    tokenizer = load_smollm2_tokenizer()
    examples = make_examples("chain_sum", "train", 64, tokenizer=tokenizer, max_length=48)
    return batches(examples, 16, Collator(tokenizer.pad_token_id))


@pytest.fixture(scope="module")
def statistics(data: list[dict[str, Tensor]]) -> lorainit.Statistics:
    return lorainit.collect_statistics(
        load_smollm2(), CONFIG, data=data, needs=lorainit.LoraDA().needs, progress=False
    )


def test_the_plain_cholesky_fails(statistics: lorainit.Statistics) -> None:
    """In float32, and for some layers in float64 too, with the published damping added."""
    failed = {torch.float32: 0, torch.float64: 0}
    for layer in statistics.values():
        for dtype in failed:
            moment = layer.input_second_moment.to(dtype)
            damped = moment + PUBLISHED_DAMPING * torch.eye(len(moment), dtype=dtype)
            failed[dtype] += int(torch.linalg.cholesky_ex(damped).info > 0)
    assert failed[torch.float32] > 0
    assert failed[torch.float64] > 0


def test_the_relative_default_gives_a_useful_start(
    statistics: lorainit.Statistics, data: list[dict[str, Tensor]]
) -> None:
    model = load_smollm2()
    with torch.no_grad():
        before = float(model(**data[0]).loss)
    wrapped = lorainit.get_peft_model(
        model, CONFIG, method=lorainit.LoraDA(), statistics=statistics, progress=False
    )
    for name, parameter in wrapped.named_parameters():
        assert torch.isfinite(parameter).all(), name
    with torch.no_grad():
        after = float(wrapped(**data[0]).loss)
    assert after < before


@pytest.mark.parametrize("damping", [PUBLISHED_DAMPING, 1e-12])
def test_a_hopeless_damping_is_an_error_that_says_what_to_do(
    statistics: lorainit.Statistics, damping: float
) -> None:
    model = load_smollm2()
    method = lorainit.LoraDA(damping=damping, damping_mode="absolute")
    with untouched(model), pytest.raises(FactorizationError) as caught:
        lorainit.get_peft_model(model, CONFIG, method=method, statistics=statistics, progress=False)
    for word in ("layer 'model.layers", "damping_mode='relative'", "raise damping"):
        assert caught.match(word)
