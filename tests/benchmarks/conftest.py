import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Generated texts go to a scratch folder, so no test leans on an earlier run."""
    monkeypatch.setenv("LORAINIT_CACHE", str(tmp_path))
