"""Hosts on asyncio, uvloop and trio; hosts that stall, are slow, or are short of threads."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio

from mbcap_watch import (
    EventLoopError,
    PersistResult,
    Snapshot,
    WatchState,
    apply_snapshot,
    persist_once,
    run,
    snapshot_path,
    watch,
)
from mbcap_watch.bridge.run import preview_once
from mbcap_watch.bridge.service import DEFAULT_BUFFER
from support import bridge, connect, document, has_landed, landed, put, quiet, until, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
LOOPS = ["asyncio", "uvloop", "trio"]


# ------------------------------------------------------------------------------ either backend


async def test_run_serves_a_host(database: Path) -> None:
    async with bridge(database) as results:
        put(document(("aa11", "confirmed", "x")), snapshot_path(database))
        assert (await results.next("applied")).reason == "rename"
        assert has_landed(database, "x")
        assert results.state.mode == "inotify"


async def test_watch_serves_a_host(database: Path) -> None:
    async with watch(quiet(database)) as results:
        assert (await anext(results)).outcome == "no_snapshot"
        put(document(("aa11", "confirmed", "x")), snapshot_path(database))
        assert (await anext(results)).outcome == "applied"
        results.sync_now()
        assert (await anext(results)).reason == "request"


async def test_persist_once_serves_a_host(database: Path) -> None:
    put(document(("aa11", "confirmed", "x")), snapshot_path(database))
    result, changes = await preview_once(quiet(database))
    assert (result.outcome, len(changes), has_landed(database, "x")) == ("applied", 1, False)
    assert (await persist_once(quiet(database))).outcome == "applied"
    assert has_landed(database, "x")


async def test_an_error_of_a_hook_arrives_unwrapped(database: Path) -> None:
    async def on_state(state: WatchState) -> None:
        await anyio.sleep(0)
        raise ZeroDivisionError(state.mode)

    with pytest.raises(ZeroDivisionError):
        await run(quiet(database), on_state=on_state)


async def test_a_host_that_cancels_leaves_nothing_behind(database: Path) -> None:
    for moment in (0.0, 0.001, 0.01, 0.1):
        with anyio.move_on_after(moment):
            await run(quiet(database))
        with anyio.move_on_after(moment):
            await persist_once(quiet(database))
        with connect(database, timeout=0) as other:
            other.execute("BEGIN IMMEDIATE")


def test_only_the_hosts_own_connection_needs_asyncio(database: Path) -> None:
    connection: Any = None  # aiosqlite could not even make one

    async def main() -> None:
        with pytest.raises(EventLoopError, match="aiosqlite"):
            await apply_snapshot(connection, Snapshot(), lock=anyio.Lock())
        lent: dict[str, Any] = {"connection": lambda: None, "lock": anyio.Lock()}
        with pytest.raises(EventLoopError, match="aiosqlite"):
            await run(quiet(database), **lent)
        with pytest.raises(EventLoopError, match="aiosqlite"):
            async with watch(quiet(database), **lent):
                pass

    trio.run(main)


# ------------------------------------------------------------------------------ slow hosts


async def test_a_slow_hook_delays_later_hooks_and_no_sync(database: Path) -> None:
    begun, go_on = anyio.Event(), anyio.Event()
    seen: list[str] = []

    async def on_result(result: PersistResult) -> None:
        begun.set()
        await go_on.wait()
        seen.append(result.outcome)

    async with anyio.create_task_group() as group:
        group.start_soon(partial(run, quiet(database), on_result=on_result))
        await begun.wait()
        for evidence in ("x", "y"):
            put(document(("aa11", "confirmed", evidence)), snapshot_path(database))
            await landed(database, evidence)
        assert seen == []
        go_on.set()
        await until(lambda: len(seen) == 3)
        assert seen == ["no_snapshot", "applied", "applied"]
        group.cancel_scope.cancel()


async def test_a_host_that_stalls_delays_no_sync(database: Path) -> None:
    """The loop stands still until the rows are there: with a bridge in it, that were for ever."""
    async with bridge(database) as results:
        for evidence in ("x", "y"):
            put(document(("aa11", "confirmed", evidence)), snapshot_path(database))
            wait_until(partial(has_landed, database, evidence), "the rows")
        assert results.outcomes == ["no_snapshot"]
        await results.count("applied", 2)


async def test_reports_for_a_host_that_stalls_are_bounded_and_counted(database: Path) -> None:
    async with bridge(database, debounce=0) as results:
        for number in range(DEFAULT_BUFFER + 3):
            put(document(("aa11", "confirmed", str(number))), snapshot_path(database))
            wait_until(partial(has_landed, database, str(number)), "the rows")
        await results.count("applied", DEFAULT_BUFFER)
        await until(lambda: results.state.reports_dropped in (2, 3), "the count")  # one may be late
        assert len(results.all) <= 1 + DEFAULT_BUFFER + 1


# ------------------------------------------------------------------------------ no thread


async def test_without_a_thread_persist_once_says_so(
    database: Path, few_threads: Callable[[int], None]
) -> None:
    put(document(("aa11", "confirmed")), snapshot_path(database))
    few_threads(0)
    result = await persist_once(quiet(database))
    assert (result.outcome, result.cause) == ("failed", "limit")
    assert "thread" in str(result.error)
    assert (await preview_once(quiet(database)))[0].outcome == "failed"


async def test_without_a_thread_for_the_connection_the_snapshot_stays_pending(
    database: Path, few_threads: Callable[[int], None]
) -> None:
    put(document(("aa11", "confirmed")), snapshot_path(database))
    few_threads(1)
    result = await persist_once(quiet(database))
    assert (result.outcome, result.cause) == ("failed", "limit")
