"""Every method against its reference implementation or its paper's formula."""

from __future__ import annotations

import pytest

from tests.methods.common import Check
from tests.methods.references import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_reference(check: Check) -> None:
    value = check.measure()
    assert check.passes(value), f"{check}: {value:.3g} against {check.bound:.3g}"
