import logging

import pytest

import lorainit
from tests.test_rank_redistribution import batches, configuration, tiny


def start(progress: bool) -> None:
    lorainit.get_peft_model(
        tiny(), configuration(), method=lorainit.LoraDA(), data=batches(), progress=progress
    )


def test_one_line_says_how_large_the_start_is(capsys: pytest.CaptureFixture[str]) -> None:
    start(progress=True)
    assert "14 layers started, |s B A| / |W| largest" in capsys.readouterr().err


def test_nothing_is_shown_where_it_was_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    start(progress=False)
    assert "layers started" not in capsys.readouterr().err


def test_the_line_goes_to_the_log_where_somebody_listens(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="lorainit"):
        start(progress=True)
    assert "layers started" in caplog.text
    assert "layers started" not in capsys.readouterr().err
