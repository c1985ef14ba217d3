"""The plot of lag and holds: well-formed whatever it is given, and to scale."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks.plot import write
from mbcap_watch import Settings
from mbcap_watch.cli import plot
from mbcap_watch.results import PersistResult, Timings
from mbcap_watch.telemetry.metrics import Metrics

NOW = 1_800_000_000.0  # 2027-01-15 08:00:00
SVG = "{http://www.w3.org/2000/svg}"


def draw(
    *values: tuple[float | None, float | None], every: float = 60.0, name: str = "m.db"
) -> ET.Element:
    """Draw looks that wrote: the lag and the hold of each, in seconds."""
    now = 0.0
    metrics = Metrics(Settings(Path("/data", name)), version="1", pid=1, clock=lambda: now)
    for lag, hold in values:
        now += every
        metrics.on_result(PersistResult(outcome="applied", reason="rename", changed_active=3))
        metrics.on_timings(Timings(lag=lag, holds=() if hold is None else (hold,)))
    return ET.fromstring(plot.svg(metrics.snapshot(NOW)))


def texts(root: ET.Element) -> list[str]:
    return [each.text or "" for each in root.iter(f"{SVG}text")]


def places(root: ET.Element, kind: str) -> list[tuple[float, float]]:
    """Where the marks are, without that of the legend."""
    if kind == "lag":
        return [(float(e.attrib["cx"]), float(e.attrib["cy"])) for e in root.iter(f"{SVG}circle")][
            1:
        ]
    paths = [e.attrib["d"] for e in root.iter(f"{SVG}path") if e.attrib["class"] == kind][1:]
    starts = [re.match(r"M([\d.]+) ([\d.]+)l", path) for path in paths]
    return [(float(start[1]), float(start[2]) + 3) for start in starts if start]


def test_marks_stand_where_the_axes_say() -> None:
    root = draw((0.01, 0.001), (0.1, None), (None, 0.01))
    lags, holds = places(root, "lag"), places(root, "hold")
    assert (len(lags), len(holds)) == (2, 2)
    ticks = {e.text: float(e.attrib["y"]) - 4 for e in root.iter(f"{SVG}text")}
    assert [y for _, y in lags] == [ticks["10 ms"], ticks["100 ms"]]
    assert [y for _, y in holds] == [ticks["1 ms"], ticks["10 ms"]]
    minutes = {e.text: float(e.attrib["x"]) for e in root.iter(f"{SVG}text")}
    assert [x for x, _ in lags] == [minutes["07:58:00"], minutes["07:59:00"]]
    assert "3 results, 2027-01-15 07:58 to 2027-01-15 08:00" in texts(root)


@pytest.mark.parametrize(
    "every, labels",
    [
        (0.001, {"08:00:00", "08:00:08"}),
        (1, {"07:56:30", "07:59:30"}),
        (60, {"04:30", "08:00"}),
        (3600, {"Jan 06", "Jan 14"}),
        (86400 * 7, {"Nov 24", "Dec 03"}),
    ],
)
def test_the_ticks_of_the_time_are_round_and_few(every: float, labels: set[str]) -> None:
    found = texts(draw(*[(0.01, 0.001)] * 240, every=every))
    times = [text for text in found if re.fullmatch(r"\d\d:\d\d(:\d\d)?|[A-Z][a-z]{2} \d\d", text)]
    assert 2 <= len(times) <= 9
    assert len(set(times)) == len(times)
    assert labels & set(times)


@pytest.mark.parametrize("lag", [0.0, 0.0000001, 0.001, 1.0, 40 * 86400.0])
def test_a_single_mark_of_any_size_is_within_the_field(lag: float) -> None:
    ((x, y),) = places(draw((lag, None)), "lag")
    assert plot._LEFT <= x <= plot._RIGHT
    assert plot._TOP <= y <= plot._BOTTOM


def test_nothing_to_draw_is_said() -> None:
    assert "nothing was written since 2027-01-15 08:00" in texts(draw())
    assert "nothing was written since 2027-01-15 07:59" in texts(draw((None, None)))


def test_a_name_may_hold_anything() -> None:
    root = draw((0.01, 0.001), name='<&"\x01\x1b\udcff\ufffe>.db')
    assert texts(root)[0].startswith('<&"\\x01\\x1b\\udcff\\ufffe>.db: ')


def test_the_plot_of_the_benchmark_is_drawn_by_the_same_function(tmp_path: Path) -> None:
    samples = {
        "ours": [0.002, 0.001, 0.005],
        "bare": [0.0001],
        "shell": [20.0],
        "watchfiles": [0.1],
    }
    write(tmp_path / "latency.svg", samples)
    root = ET.parse(tmp_path / "latency.svg").getroot()
    lines = [e.attrib["points"].split() for e in root.iter(f"{SVG}polyline")]
    lines = [line for line in lines if not line[0].endswith(",68.0")]  # those of the legend
    ticks = {e.text: e.attrib["x"] for e in root.iter(f"{SVG}text")}
    assert [place.split(",")[0] for place in lines[0]] == [
        ticks["1 ms"], ticks["1 ms"], ticks["2 ms"], ticks["5 ms"]
    ]  # fmt: skip
    assert {"mbcap-watch (3)", "inotifywait + script (1)", "0 %", "99 %", "1 s"} <= set(ticks)
    for point in (point for points in lines for point in points):
        x, y = map(float, point.split(","))
        assert plot._LEFT <= x <= plot._RIGHT
        assert plot._TOP <= y <= plot._BOTTOM
