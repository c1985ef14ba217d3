"""`writtenAt` as Go reads and prints it."""

from __future__ import annotations

import datetime as dt
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbcap_watch.snapshot import timestamp


@pytest.mark.parametrize(
    "text",
    [
        "2026-07-18T08:47:37Z",
        "2026-07-18T08:47:37.1Z",
        "2026-07-18T08:47:37.123456789Z",
        "2026-07-18T08:47:37.1234567891234567890Z",  # Go reads on and drops the rest
        "2026-07-18T08:47:37+02:00",
        "2026-07-18T08:47:37.5-23:59",
        "2026-07-18T00:00:00+00:00",
        "2026-07-18T23:59:59-00:00",
        "2024-02-29T00:00:00Z",
        "2000-02-29T00:00:00Z",
        "0000-02-29T00:00:00Z",  # Go's year 0 is a leap year
        "9999-12-31T23:59:59.999999999Z",
        timestamp.ZERO,
    ],
)
def test_accepts(text: str) -> None:
    assert timestamp.is_valid(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2026-07-18",
        "2026-07-18T08:47:37",
        "2026-07-18T08:47Z",
        "2026-07-18 08:47:37Z",
        "2026-07-18t08:47:37Z",
        "2026-07-18T08:47:37z",
        " 2026-07-18T08:47:37Z",
        "2026-07-18T08:47:37Z ",
        "2026-07-18T08:47:37Z\n",  # `$` in a pattern would let this one through
        "2026-07-18T8:47:37Z",
        "2026-07-18T08:47:37,5Z",
        "2026-07-18T08:47:37.Z",
        "2026-07-18T08:47:37.5",
        "2026-07-18T08:47:60Z",
        "2016-12-31T23:59:60Z",  # a real leap second
        "2026-07-18T24:00:00Z",
        "2026-07-18T08:60:00Z",
        "2026-02-29T00:00:00Z",
        "2026-02-30T00:00:00Z",
        "1900-02-29T00:00:00Z",
        "2026-04-31T00:00:00Z",
        "2026-00-01T00:00:00Z",
        "2026-13-01T00:00:00Z",
        "2026-01-00T00:00:00Z",
        "2026-07-18T08:47:37+24:00",
        "2026-07-18T08:47:37+02:60",
        "2026-07-18T08:47:37+0200",
        "2026-07-18T08:47:37+02",
        "2026-07-18T08:47:37\u221202:00",  # a typographic minus
        "2026-07-18T08:47:37Z+02:00",
        "12026-07-18T08:47:37Z",
        "-026-07-18T08:47:37Z",
        "26-07-18T08:47:37Z",
        "\u0662\u0660\u0662\u0666-07-18T08:47:37Z",  # digits to `int`, not to RFC 3339
        "2026-07-18T08:47:37.\u0661Z",
        "2026-07-18T08:47:37.1\0Z",
        "now",
    ],
)
def test_refuses(text: str) -> None:
    assert not timestamp.is_valid(text)


@pytest.mark.parametrize(
    "text, printed",
    [
        ("2026-07-18T08:47:37Z", "2026-07-18T08:47:37Z"),
        ("2026-07-18T08:47:37.000Z", "2026-07-18T08:47:37Z"),
        ("2026-07-18T08:47:37.120Z", "2026-07-18T08:47:37.12Z"),
        ("2026-07-18T08:47:37.000000001Z", "2026-07-18T08:47:37.000000001Z"),
        # cut, not rounded
        ("2026-07-18T08:47:37.9999999999Z", "2026-07-18T08:47:37.999999999Z"),
        ("2026-07-18T08:47:37.1000000009Z", "2026-07-18T08:47:37.1Z"),
        ("2026-07-18T08:47:37.0000000009Z", "2026-07-18T08:47:37Z"),
        ("2026-07-18T08:47:37+00:00", "2026-07-18T08:47:37Z"),
        ("2026-07-18T08:47:37.50-00:00", "2026-07-18T08:47:37.5Z"),
        ("2026-07-18T08:47:37.10+02:00", "2026-07-18T08:47:37.1+02:00"),
        ("2026-07-18T08:47:37-00:30", "2026-07-18T08:47:37-00:30"),
        (timestamp.ZERO, timestamp.ZERO),
    ],
)
def test_canonical(text: str, printed: str) -> None:
    assert timestamp.canonical(text) == printed


def test_canonical_refuses_what_is_no_time() -> None:
    with pytest.raises(ValueError, match="yesterday"):
        timestamp.canonical("yesterday")


two_digits = st.integers(0, 99).map("{:02d}".format)
fractions = st.just("") | st.text("0123456789", min_size=1, max_size=14).map(".{}".format)
offsets = st.just("Z") | st.builds("{}{}:{}".format, st.sampled_from("+-"), two_digits, two_digits)


@given(
    year=st.integers(1, 9999),
    rest=st.tuples(*[st.integers(0, 61)] * 5),
    fraction=fractions,
    offset=offsets,
)
def test_agrees_with_the_calendar_of_datetime(
    year: int, rest: tuple[int, int, int, int, int], fraction: str, offset: str
) -> None:
    try:
        dt.datetime(year, *rest, tzinfo=dt.UTC)
        exists = offset == "Z" or (int(offset[1:3]) < 24 and int(offset[4:]) < 60)
    except ValueError:
        exists = False
    month, day, hour, minute, second = rest
    text = f"{year:04d}-{month:02d}-{day:02d}T{hour:02d}:{minute:02d}:{second:02d}"
    assert timestamp.is_valid(text + fraction + offset) is exists


@given(
    moment=st.datetimes().map(lambda moment: moment.isoformat(timespec="seconds")),
    fraction=fractions,
    offset=offsets.filter(lambda offset: offset == "Z" or offset[1:3] < "24" > offset[4:]),
)
def test_canonical_is_valid_and_idempotent(moment: str, fraction: str, offset: str) -> None:
    once = timestamp.canonical(moment + fraction + offset)
    assert timestamp.is_valid(once)
    assert timestamp.canonical(once) == once


@given(st.text() | st.text("0123456789-:TZ.+", max_size=40))
def test_canonical_takes_all_that_is_valid(text: str) -> None:
    if timestamp.is_valid(text):
        timestamp.canonical(text)


@pytest.mark.usefixtures("far_from_greenwich")
def test_now_is_utc_in_any_time_zone() -> None:
    before = time.time_ns() // 1000
    stamp = timestamp.now()
    after = time.time_ns() // 1000
    assert timestamp.is_valid(stamp)
    assert timestamp.canonical(stamp) == stamp
    # `datetime` keeps microseconds; it cuts the rest, as the bounds do.
    then = dt.datetime.fromisoformat(stamp) - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    assert before <= then // dt.timedelta(microseconds=1) <= after


def test_now_has_nanoseconds() -> None:
    deadline = time.monotonic() + 10
    while len(timestamp.now()) <= len("2026-07-18T08:47:37.123456Z"):
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "nanoseconds, stamp",
    [
        (1_784_364_457_123_456_789, "2026-07-18T08:47:37.123456789Z"),
        (1_784_364_457_000_000_050, "2026-07-18T08:47:37.00000005Z"),
        (1_784_364_457_000_000_000, "2026-07-18T08:47:37Z"),
    ],
)
def test_now_is_what_the_clock_says(
    nanoseconds: int, stamp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: nanoseconds)
    assert timestamp.now() == stamp
