"""A host that is the only writer: how long its own INSERT waits while 100,000 rows change.

The bridge writes through the host's connection. The host inserts every millisecond through the same
connection, under the same lock, and another of its tasks notes by how much it is late. In turns: a
sync with all rows changed, and a window of the same length in which the bridge has nothing to do.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Final

import aiosqlite
import anyio

from benchmarks.lab import Site
from benchmarks.report import Report, Row, at_most, percentile, spread
from benchmarks.stalls import Ticker
from mbcap_watch import PersistResult, Settings
from mbcap_watch import run as run_bridge

if TYPE_CHECKING:
    from pathlib import Path

NODES: Final = 100_000
_GOAL_MS: Final = 20
_INSERT: Final = "INSERT INTO kept (id) VALUES (NULL)"


def run(root: Path, *, quick: bool) -> Report:
    """Measure the waits and the stalls, beside a sync and without one."""
    site = Site(root, "single", NODES, NODES)
    waits, stalls, seconds = asyncio.run(_measure(site, 4 if quick else 20))
    p99 = {name: percentile(some, 99) * 1000 for name, some in waits.items()}
    longest = {name: max(some) * 1000 for name, some in waits.items()}
    rows = [
        Row(
            what=f"the host's own insert during {NODES:,} changed rows, wait p99",
            ours=f"{p99['beside']:.1f} ms (longest {longest['beside']:.1f})",
            reference=f"alone: {p99['alone']:.1f} ms (longest {longest['alone']:.1f})",
            **at_most(p99["beside"], _GOAL_MS, digits=1, unit=" ms"),
        ),
        Row(
            what="the same: longest stall of its loop, median",
            ours=f"{spread(stalls['beside'])}, worst {max(stalls['beside']) * 1000:.1f}",
            reference=f"alone: {spread(stalls['alone'])}",
            **at_most(statistics.median(stalls["beside"]) * 1000, _GOAL_MS, digits=1, unit=" ms"),
        ),
        Row(what="the same: a sync takes", ours=spread(seconds, scale=1, unit="s")),
    ]
    return Report(rows, {"waits": waits, "stalls": stalls, "seconds": seconds})


async def _measure(
    site: Site, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    results: asyncio.Queue[PersistResult] = asyncio.Queue()
    waits: dict[str, list[float]] = {"beside": [], "alone": []}
    stalls: dict[str, list[float]] = {"beside": [], "alone": []}
    now: list[float] = []
    seconds: list[float] = []
    ticker, lock = Ticker(), asyncio.Lock()
    async with (
        aiosqlite.connect(site.database, isolation_level=None) as connection,
        anyio.create_task_group() as group,
    ):
        await connection.execute("PRAGMA synchronous = NORMAL")

        async def insert() -> None:
            while True:
                started = time.perf_counter()
                async with lock:
                    await connection.execute_fetchall(_INSERT)
                now.append(time.perf_counter() - started)
                await asyncio.sleep(0.001)

        def take(name: str) -> None:
            waits[name] += now
            stalls[name].append(ticker.worst())

        def begin_anew() -> float:
            now.clear()
            ticker.worst()
            return time.perf_counter()

        settings = Settings(site.database)
        bridge = partial(run_bridge, settings, connection=connection, lock=lock)
        await group.start(partial(bridge, on_result=results.put_nowait))
        results.get_nowait()
        group.start_soon(ticker.run)
        group.start_soon(insert)
        for number in range(rounds):
            await asyncio.sleep(0.3)
            started = begin_anew()
            site.publish(number % 2)
            result = await results.get()
            assert result.changed_active + result.changed_inactive == NODES, result
            seconds.append(time.perf_counter() - started)
            take("beside")
            await asyncio.sleep(0.3)
            begin_anew()
            await asyncio.sleep(seconds[-1])
            take("alone")
        group.cancel_scope.cancel()
    return waits, stalls, seconds
