"""`plot`: lag and lock holds of the latest results, as an SVG. Pure.

Readable on light and on dark: it has a background of its own, and follows the viewer's preference.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING, Final, NamedTuple

from mbcap_watch.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mbcap_watch.telemetry.stats import HistoryEntry, Stats

_NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'
_WIDTH, _HEIGHT = 800, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 760, 84, 348  # of the field within

_STYLE: Final = """
text { font: 13px sans-serif; fill: #343a40 }
.title { font-size: 16px; font-weight: bold }
.field { fill: #ffffff }
.grid { stroke: #dee2e6; fill: none }
.lag { fill: #c92a2a; stroke: #c92a2a }
.hold { fill: #1971c2; stroke: #1971c2 }
@media (prefers-color-scheme: dark) {
  text { fill: #ced4da }
  .field { fill: #1a1b1e }
  .grid { stroke: #373a40 }
  .lag { fill: #ff8787; stroke: #ff8787 }
  .hold { fill: #74c0fc; stroke: #74c0fc }
}
"""

# Round intervals of the time axis, in seconds, and how many of them are enough.
_STEPS: Final = (
    *(1, 2, 5, 10, 15, 30),
    *(60, 120, 300, 600, 900, 1800),
    *(3600, 7200, 10800, 21600, 43200, 86400),
)
_MOST_TICKS: Final = 8
_LEAST_SPAN: Final = 10.0

# Decades of the other axis that leave room for ticks at 2 and 5 as well.
_FEW_DECADES: Final = 3
_LEAST_MS: Final = 0.01

# Characters of the database's name that fit into the title.
_LONGEST_NAME: Final = 40


class _Scale(NamedTuple):
    """From values to places along an axis; both ends of both."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def svg(stats: Stats) -> str:
    """Return an SVG document of the results in `stats.history` that wrote.

    The time runs to the right, in UTC; milliseconds are on a logarithmic scale, since lags of a
    healthy bridge and of one that waited for a lock differ a thousandfold.
    """
    results = [
        each for each in stats.history if each.lag_ms is not None or each.hold_ms is not None
    ]
    name = escape(printable(PurePath(stats.database).name, _LONGEST_NAME))
    parts = [
        f'<svg {_NAMESPACE} viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}">',
        f"<title>mbcap-watch: {name}</title>",
        f"<style>{_STYLE}</style>",
        '<rect class="field" width="100%" height="100%"/>',
        _text(_LEFT, 28, f"{name}: from rename to commit, and holds of the write lock", "title"),
    ]
    if results:
        parts += _drawing(results)
    else:
        parts.append(_text(_LEFT, 54, f"nothing was written since {_minute(stats.started_at)}"))
    return "\n".join([*parts, "</svg>", ""])


def _drawing(results: Sequence[HistoryEntry]) -> Iterator[str]:
    first, last = results[0].at, results[-1].at
    across = _Scale(first, max(last, first + _LEAST_SPAN), _LEFT, _RIGHT)
    values = [
        max(value, _LEAST_MS)
        for each in results
        for value in (each.lag_ms, each.hold_ms)
        if value is not None
    ]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    up = _Scale(low, max(high, low + 1), _BOTTOM, _TOP)
    times = "result" if len(results) == 1 else "results"
    yield _text(_LEFT, 50, f"{len(results)} {times}, {_minute(first)} to {_minute(last)}")
    yield _dot("lag", _LEFT + 4, 68) + _text(_LEFT + 14, 72, "lag: rename to commit")
    yield _dot("hold", _LEFT + 194, 68) + _text(_LEFT + 204, 72, "longest hold of the write lock")
    yield from _time_axis(across)
    yield from _value_axis(up)
    for each in results:
        for kind, value in (("lag", each.lag_ms), ("hold", each.hold_ms)):
            if value is not None:
                tip = f"{_moment(each.at):%H:%M:%S}: {kind} {value:g} ms, {each.changed} rows"
                yield _dot(kind, across(each.at), up(math.log10(max(value, _LEAST_MS))), tip)


def _time_axis(across: _Scale) -> Iterator[str]:
    span = across.high - across.low
    step = next((step for step in _STEPS if span / step <= _MOST_TICKS), 0)
    step = step or math.ceil(span / _MOST_TICKS / 86400) * 86400
    form = "%H:%M:%S" if step < 60 else "%H:%M" if step < 86400 else "%b %d"  # noqa: PLR2004
    tick = math.ceil(across.low / step) * step
    while tick <= across.high:
        x = across(tick)
        yield f'<path class="grid" d="M{x:.1f} {_TOP}V{_BOTTOM}"/>'
        yield _text(x, _BOTTOM + 20, format(_moment(tick), form), anchor="middle")
        tick += step
    yield _text(_RIGHT, _BOTTOM + 40, "UTC", anchor="end")


def _value_axis(up: _Scale) -> Iterator[str]:
    few = up.high - up.low <= _FEW_DECADES
    for decade in range(int(up.low), int(up.high) + 1):
        for digit in (1, 2, 5) if few and decade < up.high else (1,):
            y = up(decade + math.log10(digit))
            ms = digit * 10.0**decade
            label = f"{ms:g} ms" if ms < 1000 else f"{ms / 1000:,g} s"  # noqa: PLR2004
            yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>'
            yield _text(_LEFT - 8, y + 4, label, anchor="end")


def _dot(kind: str, x: float, y: float, tip: str = "") -> str:
    """A disc or a diamond: the kinds are told apart without colours, too."""
    about = f"<title>{tip}</title>" if tip else ""
    if kind == "lag":
        return f'<circle class="lag" cx="{x:.1f}" cy="{y:.1f}" r="3">{about}</circle>'
    return f'<path class="hold" d="M{x:.1f} {y - 3:.1f}l3 3l-3 3l-3 -3z">{about}</path>'


def _text(x: float, y: float, text: str, kind: str = "label", anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{text}</text>'


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _minute(seconds: float) -> str:
    return format(_moment(seconds), "%Y-%m-%d %H:%M")
