"""Streams side by side: what waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lorainit.linalg import streams
from lorainit.linalg.streams import concurrent_streams

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Stream:
    """A stream that notes what it waited for."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    made = iter("abcdef")
    monkeypatch.setattr(streams, "_made", {})
    here = Stream(said, "here")

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        said.append(f"on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(said, next(made)))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    return said


def test_each_begins_after_what_was_and_ends_before_what_comes(log: list[str]) -> None:
    with concurrent_streams(CUDA, 2) as lanes:
        for lane in (*lanes, lanes[0]):
            with lane():
                log.append("work")
    assert log == [
        "a waits for here",
        "b waits for here",
        *("on a", "work", "on b", "work", "on a", "work"),
        "here waits for a",
        "here waits for b",
    ]


def test_streams_are_made_once(log: list[str]) -> None:
    for _ in range(2):
        with concurrent_streams(CUDA, 2):
            pass
    assert len(log) == 8
    assert {line.split()[0] for line in log} == {"a", "b", "here"}


def test_an_error_leaves_nothing_under_way(log: list[str]) -> None:
    with pytest.raises(ValueError, match="broken"), concurrent_streams(CUDA, 2):
        raise ValueError("broken")
    assert log[-2:] == ["here waits for a", "here waits for b"]


@pytest.mark.parametrize(("device", "number"), [(CPU, 4), (CUDA, 1)], ids=str)
def test_nothing_is_asked_of_where_there_is_nothing_to_gain(
    device: torch.device, number: int, log: list[str]
) -> None:
    with concurrent_streams(device, number) as lanes:
        assert len(lanes) == 1
        with lanes[0]():
            pass
    assert log == []
