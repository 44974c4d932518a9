"""Every method's optimum on a convolution and on an embedding; every control must miss it."""

from __future__ import annotations

import pytest

from tests.methods.kinds import KINDS, checks


@pytest.mark.parametrize("kind", KINDS)
def test_optima(kind: str) -> None:
    found = checks(kind)
    assert {check.method for check in found} > {"lora-da", "natural", "eva", "lora-one", "cg-lora"}
    values = {str(check): (check.measure(), check) for check in found}
    assert [name for name, (value, check) in values.items() if not check.passes(value)] == []
