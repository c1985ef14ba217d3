"""How memory is judged: what takes hours to show is made up here."""

from __future__ import annotations

import os
import random

import pytest

from campaigns.measured import Measured, Memory


def two_hours(a_minute: float) -> Measured:
    """Return one that filled up for five minutes, and has grown since, up and down."""
    measured, dice = Measured(os.getpid()), random.Random(1)
    measured.sample()
    for at in range(10, 7_200, 10):
        size = 20_000 + min(at, 300) * 10 + at / 60 * a_minute
        memory = Memory(size + dice.uniform(-100, 100), size + dice.uniform(-50, 50))
        measured.samples.append((float(at), memory))
    return measured


@pytest.mark.parametrize("a_minute", [0.0, -1.0, 1.2])
def test_what_stays_as_it_is(a_minute: float) -> None:
    figures = two_hours(a_minute).judge()
    assert figures["bytes of anonymous memory a minute"] <= 2_048
    assert figures["threads at most"] >= 1


def test_what_grows() -> None:
    with pytest.raises(AssertionError, match="anonymous=2"):
        two_hours(2.5).judge()


def test_forty_minutes_are_needed_to_tell() -> None:
    measured = two_hours(100.0)
    del measured.samples[200:]
    assert "bytes of anonymous memory a minute" not in measured.judge()
