"""How long a neighbour's INSERT waits while 100,000 changed rows are written.

The neighbour is another process that inserts every millisecond (`inserter.py`). In each round it is
alone for a while, then beside `persist_once`, alone again, then beside `executemany` in one
transaction, each on a database of its own.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import anyio

from benchmarks.contestants import per_row
from benchmarks.lab import Site
from benchmarks.processes import Helper
from benchmarks.report import Report, Row, at_most, percentile
from mbcap_watch import Settings, persist_once

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NODES: Final = 100_000
_ALONE_SECONDS: Final = 0.5


def run(root: Path, *, quick: bool) -> Report:
    """Measure the waits, alone and beside either."""
    ours, theirs = (Site(root, name, NODES, NODES) for name in ("ours", "theirs"))

    def apply_ours() -> None:
        result = anyio.run(persist_once, Settings(ours.database))
        assert result.changed_active + result.changed_inactive == NODES, result

    def apply_theirs() -> None:
        per_row.apply(theirs.database)

    alone: list[float] = []
    beside: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(3 if quick else 15):
        for name, site, apply in (("ours", ours, apply_ours), ("theirs", theirs, apply_theirs)):
            site.publish(number % 2)
            before, during = _waits(site, apply)
            alone += before
            beside[name] += during
    p99 = {name: percentile(waits, 99) * 1000 for name, waits in beside.items()}
    row = Row(
        what=f"a neighbour's insert during {NODES:,} changed rows, wait p99",
        ours=f"{p99['ours']:.2f} ms (longest {max(beside['ours']) * 1000:.1f})",
        reference=f"alone: {percentile(alone, 99) * 1000:.2f} ms (longest"
        f" {max(alone) * 1000:.1f}); beside executemany: longest"
        f" {max(beside['theirs']) * 1000:.0f} ms",
        **at_most(p99["ours"], 5, unit=" ms"),
    )
    return Report([row], {"alone": alone, **beside})


def _waits(site: Site, apply: Callable[[], None]) -> tuple[list[float], list[float]]:
    with Helper("inserter", site.database) as neighbour:
        neighbour.receive()
        time.sleep(_ALONE_SECONDS)
        started = time.monotonic_ns()
        apply()
        ended = time.monotonic_ns()
        waits = neighbour.ask()
    # An insert that was under way when the writing began waited for it, too.
    during = [wait / 1e9 for at, wait in waits if at + wait >= started and at <= ended]
    before = [wait / 1e9 for at, wait in waits if at + wait < started]
    return before, during
