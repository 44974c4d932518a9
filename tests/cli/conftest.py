"""A model folder and data files, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.place import make_place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("cli"))
