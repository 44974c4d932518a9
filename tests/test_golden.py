"""Gradients, subspaces and factors that the LoRA-DA authors' own code made.

``tests/data/golden/README.md`` says how the files were made and what each setting means.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lorainit
from lorainit.types import LayerStatistics

CASES = sorted((Path(__file__).parent / "data" / "golden").glob("lora_da_case_*.safetensors"))

GRADIENT_ERROR = 1e-4
ANGLE = 1e-3
PRODUCT_ERROR = 1e-3


@dataclass(frozen=True, eq=False)
class Golden:
    """One file, and the settings in its metadata as this library's."""

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, str]

    @property
    def modules(self) -> list[str]:
        return list(json.loads(self.meta["module_names"]))

    @property
    def rank(self) -> int:
        return int(self.meta["rank"])

    @property
    def token_mask(self) -> str:
        return self.meta["fisher_token_mask"]

    def method(self) -> lorainit.LoraDA:
        return lorainit.LoraDA(
            beta=float(self.meta["variance_beta"]),
            bias_weight=float(self.meta["bias_alpha"]),
            gamma=float(self.meta["gamma"]),
            damping=float(self.meta["damping"]),
            damping_mode="absolute",
            population=float(self.meta["population_size"]),
        )

    def config(self) -> LoraConfig:
        names = json.loads(self.meta["target_modules"])
        return LoraConfig(r=self.rank, lora_alpha=16, target_modules=names)

    def model(self) -> LlamaForCausalLM:
        config = json.loads(self.meta["model_config"])
        model = LlamaForCausalLM(LlamaConfig(**config))
        weights = {
            key.removeprefix("weights/"): value
            for key, value in self.tensors.items()
            if key.startswith("weights/")
        }
        model.load_state_dict(weights, strict=True)
        return model.train()

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        return list(self._batches(size))

    def _batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        ids, labels = self.tensors["data/input_ids"], self.tensors["data/labels"]
        lengths = self.tensors["data/lengths"]
        for first in range(0, len(ids), size):
            rows = slice(first, first + size)
            longest = int(lengths[rows].max())
            mask = torch.arange(longest)[None] < lengths[rows, None]
            yield {
                "input_ids": ids[rows, :longest],
                "labels": labels[rows, :longest],
                "attention_mask": mask.long(),
            }

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        return self.tensors[f"lora_A/{module}"].double(), self.tensors[f"lora_B/{module}"].double()

    def collect(self, size: int, token_mask: str | None = None) -> lorainit.Statistics:
        return lorainit.collect_statistics(
            self.model(),
            self.config(),
            data=self.batches(size),
            needs=lorainit.LoraDA().needs,
            token_mask=token_mask or self.token_mask,
            progress=False,
        )


def read(path: Path) -> Golden:
    with safe_open(path, framework="pt") as file:
        return Golden({key: file.get_tensor(key) for key in file.keys()}, file.metadata())  # noqa: SIM118


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return read(request.param)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def largest_angle(first: Tensor, second: Tensor) -> float:
    """Largest principal angle between two row spaces, from its sine: cosines lose digits."""
    p, q = (torch.linalg.qr(rows.double().mT).Q for rows in (first, second))
    return float(torch.linalg.matrix_norm(q - p @ (p.mT @ q), ord=2).clamp(max=1).arcsin())


def worst(golden: Golden, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Largest angle and largest relative error of ``B A`` over the layers."""
    assert set(pairs) == set(golden.modules)
    angles, errors = [], []
    for name, (a, b) in pairs.items():
        expected_a, expected_b = golden.factors(name)
        angles.append(largest_angle(a, expected_a))
        errors.append(relative(b.double() @ a.double(), expected_b @ expected_a))
    return max(angles), max(errors)


def solved(
    statistics: Mapping[str, LayerStatistics], method: lorainit.LoraDA, rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    pairs = {}
    for name, layer in statistics.items():
        weight = torch.zeros_like(layer.gradient)
        factors = method.solve(weight, layer, rank, 1.0)
        pairs[name] = factors.A, factors.B
    return pairs


def test_there_are_cases() -> None:
    assert len(CASES) >= 3


def test_one_case_has_the_published_settings() -> None:
    """So what is compared below is `LoraDA.paper` too, told its population."""
    published = [case for case in CASES if read(case).method() == lorainit.LoraDA.paper(2000.0)]
    assert [case.stem for case in published] == ["lora_da_case_b"]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_gradients_subspaces_and_products(golden: Golden, size: int) -> None:
    statistics = golden.collect(size)
    assert set(statistics) == set(golden.modules)
    for name, layer in statistics.items():
        assert relative(layer.gradient, golden.tensors[f"grad/{name}"]) <= GRADIENT_ERROR, name
    angle, error = worst(golden, solved(statistics, golden.method(), golden.rank))
    assert angle <= ANGLE
    assert error <= PRODUCT_ERROR


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_the_whole_line_installs_the_same_factors(golden: Golden, precision: str) -> None:
    wrapped = lorainit.get_peft_model(
        golden.model(),
        golden.config(),
        method=golden.method(),
        data=golden.batches(16),
        token_mask=golden.token_mask,
        precision=precision,
        progress=False,
    )
    state = {name: parameter.detach() for name, parameter in wrapped.named_parameters()}
    prefix = "base_model.model."
    pairs = {
        name: (
            state[f"{prefix}{name}.lora_A.default.weight"],
            state[f"{prefix}{name}.lora_B.default.weight"],
        )
        for name in golden.modules
    }
    angle, error = worst(golden, pairs)
    assert angle <= ANGLE
    assert error <= PRODUCT_ERROR


class TestWhatIsLeftOutShows:
    """Each part that the comparison is meant to check breaks it when it is left out."""

    def test_other_token_mask(self, golden: Golden) -> None:
        other = {"attention": "labels", "labels": "attention"}[golden.token_mask]
        statistics = golden.collect(16, token_mask=other)
        _, error = worst(golden, solved(statistics, golden.method(), golden.rank))
        assert error > 100 * PRODUCT_ERROR

    def test_damping(self, golden: Golden) -> None:
        method = replace(golden.method(), damping=1e-14)
        statistics = _widened(golden.collect(16))
        _, error = worst(golden, solved(statistics, method, golden.rank))
        assert error > 50 * PRODUCT_ERROR

    def test_output_moment(self, golden: Golden) -> None:
        def constant(layer: LayerStatistics) -> LayerStatistics:
            diagonal = layer.output_second_moment_diagonal_sum
            assert diagonal is not None
            flat = torch.full_like(diagonal, float(diagonal.mean()))
            return replace(layer, output_second_moment_diagonal_sum=flat)

        statistics = {name: constant(layer) for name, layer in golden.collect(16).items()}
        _, error = worst(golden, solved(statistics, golden.method(), golden.rank))
        assert error > 10 * PRODUCT_ERROR

    def test_input_moment(self, golden: Golden) -> None:
        def identity(layer: LayerStatistics) -> LayerStatistics:
            moment = layer.input_second_moment_sum
            assert moment is not None
            return replace(
                layer, input_second_moment_sum=layer.positions * torch.eye(moment.shape[0])
            )

        statistics = {name: identity(layer) for name, layer in golden.collect(16).items()}
        _, error = worst(golden, solved(statistics, golden.method(), golden.rank))
        assert error > 100 * PRODUCT_ERROR

    def test_variance(self, golden: Golden) -> None:
        method = golden.method()
        if method.beta == 0:
            pytest.skip("this case has no variance term")
        statistics = golden.collect(16)
        _, error = worst(golden, solved(statistics, replace(method, beta=0.0), golden.rank))
        assert error > 10 * PRODUCT_ERROR

    def test_the_mean_loss_of_a_batch(self, golden: Golden) -> None:
        """A model's own loss weighs tokens, not sequences; through one it is another gradient."""

        def own_loss(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            rows = batch["input_ids"].shape[0]
            loss: Tensor = model(**batch).loss
            return loss.expand(rows)

        statistics = lorainit.collect_statistics(
            golden.model(),
            golden.config(),
            data=golden.batches(16),
            needs={"gradient"},
            loss_fn=own_loss,
            progress=False,
        )
        errors = [
            relative(layer.gradient, golden.tensors[f"grad/{name}"])
            for name, layer in statistics.items()
        ]
        assert min(errors) > 100 * GRADIENT_ERROR


def _widened(statistics: lorainit.Statistics) -> lorainit.Statistics:
    """In float64, so that the smallest damping still leaves the moments positive definite."""
    return statistics.to(dtype=torch.float64)
