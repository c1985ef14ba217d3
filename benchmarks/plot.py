"""The plot of the latencies: how large a share was visible after how long."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Final

from mbcap_watch.cli import plot

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

_LINES: Final = {
    "ours": ("#d9480f", "mbcap-watch"),
    "bare": ("#868e96", "bare loop"),
    "watchfiles": ("#1971c2", "watchfiles"),
    "shell": ("#2f9e44", "inotifywait + script"),
}
_TITLE: Final = "From the rename until another connection sees the values"
_DECADES: Final = (0, 3)


def write(path: Path, samples: Mapping[str, Sequence[float]]) -> None:
    """Draw the cumulative distributions of `samples` (seconds) over a logarithmic axis in ms."""
    right, up = plot.Scale(*_DECADES, *plot.ACROSS), plot.Scale(0, 1, *plot.UP)
    legend, marks = [], []
    for name, values in samples.items():
        colour, label = _LINES[name]
        places = [right(_decade(value)) for value in sorted(values)]
        steps = [(x, up((at + 1) / len(places))) for at, x in enumerate(places)]
        marks.append(_line(colour, [(places[0], up(0)), *steps]))
        legend.append((partial(_stroke, colour), f"{label} ({len(places)})"))
    shares = [(up(share / 100), f"{share} %") for share in (0, 50, 90, 99)]
    ticks = plot.decades(right), shares
    drawing = plot.chart(_TITLE, ["share of samples"], legend, ticks, marks)
    path.write_text(drawing, encoding="utf-8")


def _decade(seconds: float) -> float:
    return min(max(math.log10(max(seconds, 1e-9) * 1000), _DECADES[0]), _DECADES[1])


def _line(colour: str, points: Iterable[tuple[float, float]]) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _stroke(colour: str, x: float, y: float) -> str:
    return _line(colour, [(x - 4, y), (x + 4, y)])
