"""The plot of the latencies: how large a share was visible after how long. Plain SVG."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_WIDTH, _HEIGHT, _LEFT, _TOP = 760, 320, 56, 40
_COLORS: Final = {
    "ours": "#d9480f",
    "bare": "#495057",
    "watchfiles": "#1971c2",
    "shell": "#2f9e44",
}
_LABELS: Final = {
    "ours": "mbcap-watch",
    "bare": "bare loop",
    "watchfiles": "watchfiles",
    "shell": "inotifywait + script",
}
_TITLE: Final = "From the rename until another connection sees the values: share of samples"
_FIRST_DECADE, _LAST_DECADE = 0, 3


def write(path: Path, samples: Mapping[str, Sequence[float]]) -> None:
    """Draw the cumulative distributions of `samples` (seconds) over a logarithmic axis in ms."""
    bottom, right = _TOP + _HEIGHT, _LEFT + _WIDTH
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 20} {bottom + 56}">',
        "<style>text { font: 13px sans-serif }</style>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="24">{_TITLE}</text>',
    ]
    for share in (0, 50, 90, 99):
        y = _y(share / 100)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#dee2e6"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share} %</text>')
    for decade in range(_FIRST_DECADE, _LAST_DECADE + 1):
        for step in (1, 2, 5):
            milliseconds = step * 10**decade
            x = _x(milliseconds / 1000)
            if x > right + 1:
                continue
            parts.append(f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="#dee2e6"/>')
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{milliseconds}</text>'
            )
    parts.append(f'<text x="{right}" y="{bottom + 44}" text-anchor="end">milliseconds</text>')
    for number, (name, values) in enumerate(samples.items()):
        ordered = sorted(values)
        points = " ".join(
            f"{_x(value):.1f},{_y((at + 1) / len(ordered)):.1f}" for at, value in enumerate(ordered)
        )
        start = f"{_x(ordered[0]):.1f},{_y(0):.1f}"
        parts.append(
            f'<polyline points="{start} {points}" fill="none" stroke="{_COLORS[name]}"'
            ' stroke-width="2"/>'
        )
        parts.append(
            f'<text x="{_LEFT + 170 * number}" y="{bottom + 44}" fill="{_COLORS[name]}">'
            f"{_LABELS[name]} ({len(ordered)})</text>"
        )
    parts.append("</svg>")
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _x(seconds: float) -> float:
    decades = math.log10(max(seconds * 1000, 10**_FIRST_DECADE)) - _FIRST_DECADE
    return _LEFT + _WIDTH * min(decades / (_LAST_DECADE - _FIRST_DECADE), 1.0)


def _y(share: float) -> float:
    return _TOP + _HEIGHT * (1 - share)
