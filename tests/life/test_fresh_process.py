"""What is written is read in another process as in the one that wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorainit
from tests.adapters import tiny
from tests.fresh import run_forked

pytestmark = pytest.mark.filterwarnings("ignore")


def floats(model: torch.nn.Module) -> list[float]:
    found: list[float] = tiny.logits(model).double().flatten().tolist()
    return found


def test_statistics_and_several_adapters_in_a_fresh_process(tmp_path: Path) -> None:
    """To the last bit: starts from a statistics file; two methods' adapters on one model."""
    needs = tiny.METHODS["displaced"].needs | tiny.METHODS["anchored"].needs
    statistics = lorainit.collect_statistics(
        tiny.llama(), tiny.config(), data=[tiny.batch()], needs=needs, progress=False
    )
    statistics.save(tmp_path / "statistics.safetensors")
    expected = {}
    for kind in ("displaced", "anchored"):
        model = tiny.start(
            tiny.llama(), tiny.METHODS[kind], tiny.config(), data=None, statistics=statistics
        )
        expected[kind] = floats(tiny.train(model))
    both = tiny.start(tiny.llama(), tiny.METHODS["anchored"], tiny.config(), adapter_name="first")
    tiny.train(both, seed=5)
    tiny.start(both, tiny.METHODS["displaced"], tiny.config(), adapter_name="second")
    both.save_pretrained(tmp_path / "both")
    for name in ("first", "second"):
        both.set_adapter(name)
        expected[name] = floats(both)
    found = tiny.run_fresh(
        """
        import torch
        import lorainit
        from tests.adapters import tiny
        torch.set_num_threads(1)
        statistics = lorainit.Statistics.load(f"{root}/statistics.safetensors")
        result = {}
        for kind in ("displaced", "anchored"):
            torch.manual_seed(0)
            model = tiny.start(
                tiny.llama(), tiny.METHODS[kind], tiny.config(), data=None, statistics=statistics
            )
            result[kind] = tiny.logits(tiny.train(model)).double().flatten().tolist()
        both = tiny.llama()
        for name in ("first", "second"):
            both = lorainit.load_adapter(both, f"{root}/both/{name}", adapter_name=name)
            both.set_adapter(name)
            result[name] = tiny.logits(both).double().flatten().tolist()
        """,
        root=str(tmp_path),
    )
    assert found == expected
    assert len({tuple(value) for value in found.values()}) == 4


@pytest.mark.parametrize("kind", ["int8"])
def test_an_adapter_of_a_quantized_base_in_a_fresh_process(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from tests.life.test_quantized import quantized

    wrapped = tiny.train(tiny.start(quantized(kind), tiny.METHODS["anchored"]))
    wrapped.save_pretrained(tmp_path)
    found = run_forked(
        """
        import torch
        import lorainit
        from tests.adapters import tiny
        from tests.life.test_quantized import quantized
        torch.set_num_threads(1)
        model = lorainit.load_adapter(quantized(kind), folder)
        result = tiny.logits(model).double().flatten().tolist()
        """,
        kind=kind,
        folder=str(tmp_path),
    )
    assert found == floats(wrapped)
