"""What a benchmark hands over, and how it is shown."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sqlite3
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS: Final = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        what: what was measured.
        ours: our figure, with its spread.
        reference: what it is measured against, with its figure.
        outcome: the figure that the goal is about.
        goal: that goal.
        met: whether it is met; None where there is none.

    """

    what: str
    ours: str
    reference: str = "–"
    outcome: str = "–"
    goal: str = "–"
    met: bool | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The rows of a benchmark, and every sample that they were made of."""

    rows: list[Row]
    samples: dict[str, Any]


def at_most(value: float, limit: float, *, digits: int = 2, unit: str = "×") -> dict[str, Any]:
    """Return `outcome`, `goal` and `met` of a row whose figure may not exceed `limit`."""
    return {
        "outcome": f"{value:.{digits}f}{unit}",
        "goal": f"≤ {limit:g}{unit}",
        "met": value <= limit,
    }


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return a percentile by linear interpolation."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(samples: Sequence[float], *, scale: float = 1000.0, unit: str = "ms") -> str:
    """Return median and, in brackets, the 10th to the 90th percentile; samples are seconds."""
    middle, low, high = (
        value * scale
        for value in (
            statistics.median(samples),
            percentile(samples, 10),
            percentile(samples, 90),
        )
    )
    return f"{_number(middle)} ({_number(low)}–{_number(high)}) {unit}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def machine() -> str:
    """Return what the figures were measured on."""
    return (
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version},"
        f" Linux {platform.release()}, {os.cpu_count()} processors"
    )


def save(name: str, report: Report, *, quick: bool) -> None:
    """Write `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    document = {
        "machine": machine(),
        "quick": quick,
        "rows": [dataclasses.asdict(row) for row in report.rows],
        "samples": report.samples,
    }
    text = json.dumps(document, ensure_ascii=False, indent=1)
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    verdict = {True: "yes", False: "**no**", None: "–"}
    lines = [
        "| what | ours | reference | result | goal | met |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row.what} | {row.ours} | {row.reference} | {row.outcome} | {row.goal}"
            f" | {verdict[row.met]} |"
            for row in rows
        ),
    ]
    return "\n".join(lines)
