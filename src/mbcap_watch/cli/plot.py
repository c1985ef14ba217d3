"""`plot`: lag and lock holds of the latest results, as an SVG; `chart` draws any. Pure.

Readable on light and on dark: it has a background of its own, and follows the viewer's preference.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from functools import partial
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from mbcap_watch.errors import counted, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mbcap_watch.telemetry.stats import Stats

_NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'
_WIDTH, _HEIGHT = 800, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 760, 84, 348  # of the field within
ACROSS, UP = (_LEFT, _RIGHT), (_BOTTOM, _TOP)

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


class Scale(NamedTuple):
    """From values to places along an axis; both ends of both."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


Mark: TypeAlias = "Callable[[float, float], str]"
Ticks: TypeAlias = "Iterable[tuple[float, str]]"


def chart(
    title: str,
    notes: Sequence[str],
    legend: Iterable[tuple[Mark, str]],
    ticks: tuple[Ticks, Ticks],
    marks: Iterable[str],
) -> str:
    """Return an SVG document.

    `notes` are a line below the title, and the unit of the axis that runs to the right; `legend`
    has what draws a mark and what it stands for; `ticks` have places along both axes, that to the
    right first, and what is written there; `marks` are drawn on the field.
    """
    parts = [
        f'<svg {_NAMESPACE} viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}">',
        f"<title>{title}</title>",
        f"<style>{_STYLE}</style>",
        '<rect class="field" width="100%" height="100%"/>',
        _text(_LEFT, 28, title, "title"),
        _text(_LEFT, 50, notes[0]),
        *(_text(_RIGHT, _BOTTOM + 40, unit, anchor="end") for unit in notes[1:]),
    ]
    for left, (mark, meaning) in zip(range(_LEFT + 4, _RIGHT, 174), legend, strict=False):
        parts += [mark(left, 68), _text(left + 10, 72, meaning)]
    for x, label in ticks[0]:
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{_BOTTOM}"/>')
        parts.append(_text(x, _BOTTOM + 20, label, anchor="middle"))
    for y, label in ticks[1]:
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>')
        parts.append(_text(_LEFT - 8, y + 4, label, anchor="end"))
    return "\n".join([*parts, *marks, "</svg>", ""])


def svg(stats: Stats) -> str:
    """Return an SVG document of the results in `stats.history` that wrote.

    The time runs to the right, in UTC; milliseconds are on a logarithmic scale, since lags of a
    healthy bridge and of one that waited for a lock differ a thousandfold.
    """
    results = [
        each for each in stats.history if each.lag_ms is not None or each.hold_ms is not None
    ]
    name = escape(printable(PurePath(stats.database).name, _LONGEST_NAME))
    title = f"{name}: from rename to commit, and holds of the write lock"
    if not results:
        note = f"nothing was written since {_minute(stats.started_at)}"
        return chart(title, [note], (), ((), ()), ())
    measured = [
        (each, kind, value, math.log10(max(value, _LEAST_MS)))
        for each in results
        for kind, value in (("lag", each.lag_ms), ("hold", each.hold_ms))
        if value is not None
    ]
    first, last = results[0].at, results[-1].at
    right = Scale(first, max(last, first + _LEAST_SPAN), *ACROSS)
    logarithms = [logarithm for *_, logarithm in measured]
    low, high = math.floor(min(logarithms)), math.ceil(max(logarithms))
    up = Scale(low, max(high, low + 1), *UP)
    count = counted(len(results), "result", "results")
    notes = [f"{count}, {_minute(first)} to {_minute(last)}", "UTC"]
    legend = [
        (partial(_dot, "lag"), "lag: rename to commit"),
        (partial(_dot, "hold"), "longest hold of the write lock"),
    ]
    marks = []
    for each, kind, value, logarithm in measured:
        rows = counted(each.changed, "row", "rows")
        tip = f"{_moment(each.at):%H:%M:%S}: {kind} {value:g} ms, {rows}"
        marks.append(_dot(kind, right(each.at), up(logarithm), tip))
    return chart(title, notes, legend, (_times(right), decades(up)), marks)


def _times(right: Scale) -> Iterator[tuple[float, str]]:
    span = right.high - right.low
    step = next((step for step in _STEPS if span / step <= _MOST_TICKS), 0)
    step = step or math.ceil(span / _MOST_TICKS / 86400) * 86400
    form = "%H:%M:%S" if step < 60 else "%H:%M" if step < 86400 else "%b %d"  # noqa: PLR2004
    tick = math.ceil(right.low / step) * step
    while tick <= right.high:
        yield right(tick), format(_moment(tick), form)
        tick += step


def decades(scale: Scale) -> Iterator[tuple[float, str]]:
    """Yield the ticks of an axis of milliseconds whose values are decimal logarithms."""
    few = scale.high - scale.low <= _FEW_DECADES
    for decade in range(int(scale.low), int(scale.high) + 1):
        for digit in (1, 2, 5) if few and decade < scale.high else (1,):
            ms = digit * 10.0**decade
            label = f"{ms:g} ms" if ms < 1000 else f"{ms / 1000:,g} s"  # noqa: PLR2004
            yield scale(decade + math.log10(digit)), label


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
