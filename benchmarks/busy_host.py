"""A host with a thread that is busy in Python, while 12,000 rows change.

Such a thread has the GIL for 5 ms at a time (`sys.getswitchinterval`), and what gives it up once a
row waits for it once a row. A neighbour in another process inserts every millisecond meanwhile.
"""

from __future__ import annotations

import statistics
import threading
import time
from typing import TYPE_CHECKING, Final

import anyio

from benchmarks.lab import Site
from benchmarks.processes import Helper
from benchmarks.report import Report, Row, at_most, spread
from mbcap_watch import Settings, persist_once

if TYPE_CHECKING:
    from pathlib import Path

NODES: Final = 12_000
_ALONE_SECONDS: Final = 0.3


def run(root: Path, *, quick: bool) -> Report:
    """Measure the time that it takes, and how long the neighbour waits."""
    site = Site(root, "busy", NODES, NODES)
    site.publish(0)
    anyio.run(persist_once, Settings(site.database))
    seconds: list[float] = []
    longest: list[float] = []
    done = threading.Event()
    threading.Thread(target=_spin, args=(done,), daemon=True).start()
    try:
        for number in range(3 if quick else 15):
            site.publish((number + 1) % 2)
            with Helper("inserter", site.database) as neighbour:
                neighbour.receive()
                time.sleep(_ALONE_SECONDS)
                started = time.monotonic_ns()
                result = anyio.run(persist_once, Settings(site.database))
                ended = time.monotonic_ns()
                waits = neighbour.ask()
            assert result.changed_active + result.changed_inactive == NODES, result
            seconds.append((ended - started) / 1e9)
            during = (wait for at, wait in waits if at + wait >= started and at <= ended)
            longest.append(max(during) / 1e9)
    finally:
        done.set()
    what = f"{NODES:,} rows changed beside a host thread that is busy in Python"
    rows = [
        Row(
            what=what,
            ours=spread(seconds),
            **at_most(statistics.median(seconds), 1, unit=" s"),
        ),
        Row(
            what="the same: a neighbour's longest wait",
            ours=spread(longest),
            **at_most(statistics.median(longest) * 1000, 20, digits=1, unit=" ms"),
        ),
    ]
    return Report(rows, {"seconds": seconds, "longest waits": longest})


def _spin(done: threading.Event) -> None:
    number = 0
    while not done.is_set():
        for _ in range(1000):
            number = (number * 31 + 7) % 1_000_003
