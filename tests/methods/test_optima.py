"""Every method against its closed-form optimum; every control must miss it."""

from __future__ import annotations

import pytest

from tests.methods.common import Check
from tests.methods.optima import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_optimum(check: Check) -> None:
    value = check.measure()
    assert check.passes(value), f"{check}: {value:.3g} against {check.bound:.3g}"
