"""How long an embedded bridge holds up its host's event loop.

The host's task wakes every millisecond and notes by how much it is late. In turns: a window in
which another process renames a snapshot with all its rows changed, and one of the same length in
which the bridge has nothing to do, which shows what the machine itself does to a loop.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Final

import anyio

from benchmarks.lab import Site
from benchmarks.processes import Helper
from benchmarks.report import Report, Row, at_most, spread
from mbcap_watch import PersistResult, Settings
from mbcap_watch import run as run_bridge

if TYPE_CHECKING:
    from pathlib import Path

_GOALS: Final = {2_400: 0.003, 100_000: 0.020}
_TICK: Final = 0.001


class Ticker:
    """Wakes every millisecond; knows the worst delay since it was last asked."""

    def __init__(self) -> None:
        self._worst = 0.0

    async def run(self) -> None:
        """Tick for ever."""
        while True:
            due = time.perf_counter() + _TICK
            await asyncio.sleep(_TICK)
            self._worst = max(self._worst, time.perf_counter() - due)

    def worst(self) -> float:
        """Return the worst delay in seconds, and begin anew."""
        worst, self._worst = self._worst, 0.0
        return worst


def run(root: Path, *, quick: bool) -> Report:
    """Measure both sizes."""
    rows = []
    samples = {}
    for nodes, limit in _GOALS.items():
        site = Site(root, str(nodes), nodes, nodes)
        rounds = 5 if quick else 60 if nodes < 10_000 else 20
        with Helper("publisher") as publisher:
            busy, quiet = anyio.run(_measure, site, publisher, rounds)
        samples[str(nodes)] = {"looking": busy, "waiting": quiet}
        middle = statistics.median(busy)
        rows.append(
            Row(
                what=f"event loop of the host, {nodes:,} entries: longest stall of a sync, median",
                ours=f"{spread(busy)}, worst {max(busy) * 1000:.1f}",
                reference=f"bridge waiting: {spread(quiet)}, worst {max(quiet) * 1000:.1f}",
                **at_most(middle * 1000, limit * 1000, digits=1, unit=" ms"),
            )
        )
    return Report(rows, samples)


async def _measure(site: Site, publisher: Helper, rounds: int) -> tuple[list[float], list[float]]:
    results: asyncio.Queue[PersistResult] = asyncio.Queue()
    busy: list[float] = []
    quiet: list[float] = []
    ticker = Ticker()
    async with anyio.create_task_group() as group:
        await group.start(
            partial(run_bridge, Settings(site.database), on_result=results.put_nowait)
        )
        results.get_nowait()
        group.start_soon(ticker.run)
        for number in range(rounds + 1):
            staged = site.stage(number % 2)
            await asyncio.sleep(0.2)
            ticker.worst()
            started = time.monotonic()
            publisher.send({"staged": str(staged), "target": str(site.target)})
            result = await results.get()
            assert result.changed_active + result.changed_inactive == len(site.moving), result
            busy.append(ticker.worst())
            publisher.receive()
            window = time.monotonic() - started
            await asyncio.sleep(0.2)
            ticker.worst()
            await asyncio.sleep(window)
            quiet.append(ticker.worst())
        group.cancel_scope.cancel()
    return busy[1:], quiet[1:]
