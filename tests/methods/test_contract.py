"""What every method in the table must do, measured or refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lorainit.errors import MissingStatisticError, NonFiniteError, RankError
from lorainit.methods import METHODS
from lorainit.types import STATISTICS, LayerStatistics, Method, ReadsReference, settings_of
from tests.methods.common import IN, OUT, RANK, Check, layer
from tests.methods.contract import CHECKS, FULL_RANK, SCALED_OUT

all_methods = pytest.mark.parametrize("name", list(METHODS))


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_contract(check: Check) -> None:
    value = check.measure()
    assert check.passes(value), f"{check}: {value:.3g} against {check.bound:.3g}"


@all_methods
def test_is_a_method_with_known_needs(name: str) -> None:
    method = METHODS[name]()
    assert isinstance(method, Method)
    assert method.needs <= STATISTICS
    assert isinstance(METHODS[name].paper(), METHODS[name])


@all_methods
def test_settings_are_frozen_hashable_and_survive_json(name: str) -> None:
    for method in (METHODS[name](), METHODS[name].paper()):
        settings = json.loads(json.dumps(settings_of(method)))
        assert settings.pop("method") == METHODS[name].__name__
        again = METHODS[name](**settings)
        assert again == method
        assert hash(again) == hash(method)
        with pytest.raises(dataclasses.FrozenInstanceError):
            method.anything = 1


@all_methods
@pytest.mark.parametrize("rank", [0, -1, OUT + 1, IN])
def test_impossible_rank(name: str, rank: int) -> None:
    with pytest.raises(RankError, match=r"rank"):
        METHODS[name]().solve(*layer(), rank, 1.0)


@pytest.mark.parametrize(
    ("name", "rank"), [("lora-ga", FULL_RANK["lora-ga"] + 1), ("orthogonal", 3), ("loram", 1)]
)
def test_rank_a_method_cannot_have(name: str, rank: int) -> None:
    with pytest.raises(RankError, match=r"rank"):
        METHODS[name]().solve(*layer(), rank, 1.0)


@all_methods
def test_every_missing_statistic_is_named(name: str) -> None:
    weight, full = layer()
    method = METHODS[name]()
    assert method.needs <= full.available
    fields = {
        "gradient": "gradient_sum",
        "input_second_moment": "input_second_moment_sum",
        "input_mean": "input_sum",
        "output_second_moment": "output_second_moment_sum",
        "output_second_moment_diagonal": "output_second_moment_sum",
    }
    for needed in method.needs:
        without = dataclasses.replace(full, **{fields[needed]: None})
        with pytest.raises(MissingStatisticError, match=f"'{needed}'"):
            method.solve(weight, without, RANK, 1.0)


def reads_reference(name: str) -> bool:
    method = METHODS[name]()
    return isinstance(method, ReadsReference) and method.needs_reference


def test_methods_of_quantized_bases_say_so() -> None:
    assert {n for n in METHODS if reads_reference(n)} == {"loftq", "qera", "kronecker-qer"}
    assert isinstance(METHODS["auto"](), ReadsReference)
    assert not isinstance(METHODS["natural"](), ReadsReference)


@pytest.mark.parametrize("name", [n for n in METHODS if reads_reference(n)])
def test_a_missing_reference_is_named(name: str) -> None:
    weight, full = layer()
    with pytest.raises(MissingStatisticError, match="reference_weights"):
        METHODS[name]().solve(weight, dataclasses.replace(full, weight_error=None), RANK, 1.0)


@all_methods
def test_reads_no_more_than_it_needs(name: str) -> None:
    """With only the needed statistics the result is that with all of them."""
    weight, full = layer()
    method = METHODS[name]()
    needs = method.needs
    only = LayerStatistics(
        gradient_sum=full.gradient_sum if "gradient" in needs else None,
        input_second_moment_sum=(
            full.input_second_moment_sum if "input_second_moment" in needs else None
        ),
        input_sum=full.input_sum if "input_mean" in needs else None,
        output_second_moment_sum=(
            full.output_second_moment_sum if "output_second_moment" in needs else None
        ),
        output_second_moment_diagonal_sum=(
            full.output_second_moment_sum.diagonal()  # type: ignore[union-attr]
            if "output_second_moment_diagonal" in needs
            else None
        ),
        sequences=full.sequences,
        label_tokens=full.label_tokens,
        positions=full.positions,
        population=full.population,
        weight_error=full.weight_error if reads_reference(name) else None,
    )
    torch.manual_seed(0)
    wanted = method.solve(weight, full, RANK, 2.0)
    torch.manual_seed(0)
    found = method.solve(weight, only, RANK, 2.0)
    assert torch.equal(found.A, wanted.A)
    assert torch.equal(found.B, wanted.B)


@all_methods
def test_input_that_is_not_finite_is_refused(name: str) -> None:
    weight, full = layer()
    method = METHODS[name]()
    if name in ("pissa", "milora", "olora", "loram", "corda", "astra", "filet", "farss"):
        weight = weight.clone()
        weight[1, 2] = float("nan")
    elif reads_reference(name):
        error = full.weight_error.clone()  # type: ignore[union-attr]
        error[1, 2] = float("nan")
        full = dataclasses.replace(full, weight_error=error)
    elif method.needs:
        bad = "input_second_moment_sum" if name == "eva" else "gradient_sum"
        tensor = getattr(full, bad).clone()
        tensor[1, 2] = float("inf")
        full = dataclasses.replace(full, **{bad: tensor})
    else:
        pytest.skip("reads nothing")
    with pytest.raises(NonFiniteError, match="not finite"):
        method.solve(weight, full, RANK, 2.0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("eva", {"rho": 0.5}),
        ("corda", {"mode": "top"}),
        ("corda", {"damping": -1.0}),
        ("lora-ga", {"direction": "BrA2r"}),
        ("lora-ga", {"scale": "big"}),
        ("lora-ga", {"gamma": 0.0}),
        ("lora-one", {"gamma": float("nan")}),
        ("lora-da", {"beta": -0.1}),
        ("lora-da", {"damping_mode": "none"}),
        ("filet", {"select": "middle"}),
        ("vanilla", {"size": 0.0}),
        ("natural", {"activation": 0.0}),
        ("natural", {"spare": 0.0}),
        ("natural", {"length": 0.0}),
        ("natural", {"trust_region": 0.0}),
        ("natural", {"damping_mode": "none"}),
        ("astra", {"select": "tail"}),
        ("farss", {"highest_from": 0}),
        ("farss", {"early_blocks": -1}),
        ("init-ab", {"scale_a": 0.0}),
        ("init-ab", {"scale_b": -1.0}),
        ("gora", {"length": 0.0}),
        ("gora", {"rho": 0.5}),
        ("gora", {"least": 1.5}),
        ("filet", {"loss_batch": 0}),
        ("lora-da", {"output_damping": 0.0}),
        ("lora-da", {"balance": True, "scale": "calibrated"}),
        ("cg-lora", {"sides": "none"}),
        ("cg-lora", {"gamma": 0.0}),
        ("cg-lora", {"damping": -1.0}),
        ("cg-lora", {"anchored": True, "scale": "calibrated"}),
        ("random", {"like": "nothing"}),
        ("random", {"like": {"method": "pissa", "length": 1.0}}),
        ("random", {"like": METHODS["random"]()}),
        ("random", {"seed": 0.5}),
        ("qera", {"form": "approximate"}),
        ("qera", {"damping": -1.0}),
        ("kronecker-qer", {"damping_mode": "none"}),
        ("kronecker-qer", {"rho": 0.5}),
    ],
)
def test_bad_settings_are_refused_at_construction(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        METHODS[name](**settings)


@pytest.mark.parametrize("name", [name for name in SCALED_OUT if name != "random"])
def test_scaling_that_cannot_be_divided_out(name: str) -> None:
    with pytest.raises(ValueError, match="scaling"):
        METHODS[name]().solve(*layer(), RANK, 0.0)
