"""The section of axolotl's configuration, and what of it reaches the start; axolotl itself is not needed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

pytest.importorskip("pydantic")


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, over a base class of which only the name is axolotl's."""
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = object  # type: ignore[attr-defined]
    name = "lorainit.integrations.axolotl"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    # No other test finds it without axolotl.
    sys.modules.pop(name)
    del sys.modules["lorainit.integrations"].axolotl  # type: ignore[attr-defined]


@pytest.mark.parametrize("given", [None, {"match_learning_rate": True, "max_sequences": 16}])
@pytest.mark.parametrize("kind", [dict, SimpleNamespace, "section"])
def test_the_section_reaches_the_start(
    plugin: Any, kind: Any, given: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(plugin, "start_trainer", lambda *_, **options: calls.append(options))
    section: Any = given
    if given is not None:
        section = plugin.LorainitSection(**given) if kind == "section" else kind(**given)
    trainer = SimpleNamespace(model=nn.Identity())
    cfg = SimpleNamespace(adapter="lora", lorainit=section)
    plugin.LorainitPlugin().post_trainer_create(cfg, trainer)
    (options,) = calls
    assert options["match_learning_rate"] is (given is not None)
    assert options["max_sequences"] == (256 if given is None else 16)
    # axolotl always has a rate, which stays.
    assert options["set_learning_rate"] is False
    cfg.adapter = None
    plugin.LorainitPlugin().post_trainer_create(cfg, trainer)
    assert len(calls) == 1
