"""At home in an async host: pulling results, looking now, the host's own connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import aiosqlite
import anyio
import pytest

from mbcap_watch import (
    Entry,
    EventLoopError,
    SettingsError,
    Snapshot,
    TransactionOpen,
    Trigger,
    apply_snapshot,
    snapshot_path,
    watch,
)
from mbcap_watch.bridge.loop import Bridge
from support import (
    DEADLINE,
    at_rest,
    bridge,
    connect,
    document,
    each_kind_of_connection,
    landed,
    locked,
    make_database,
    open_descriptors,
    put,
    quiet,
    read_rows,
    threads_beside,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
LOOPS = ["asyncio", "uvloop"]


# ------------------------------------------------------------------------------ pulling


async def test_entering_waits_for_a_first_look_that_takes_long(
    database: Path, slow_pages: Callable[[int], None]
) -> None:
    slow_pages(8)
    async with watch(quiet(database)) as results:
        assert results.state.last_sync is not None
        assert results.state.last_progress is not None
        assert ("nodes", "aa11", 2, "") in read_rows(database)


async def test_a_slow_host_loses_old_reports_and_nothing_else(database: Path) -> None:
    async with watch(quiet(database, debounce=0), buffer=2) as results:
        for number in range(6):
            put(document(("aa11", "confirmed", str(number))), snapshot_path(database))
            await landed(database, str(number))
        # Two syncs make one result where the reader above was in the way of the first.
        await until(lambda: results.dropped > 1)
        assert [(await anext(results)).outcome, (await anext(results)).outcome] == ["applied"] * 2


async def test_leaving_ends_an_iteration_elsewhere(database: Path) -> None:
    seen: list[str] = []
    async with anyio.create_task_group() as group, watch(quiet(database)) as results:

        async def consume() -> None:
            async for result in results:
                seen.append(result.outcome)

        group.start_soon(consume)
        await until(lambda: seen)
    assert seen == ["no_snapshot"]


async def test_an_error_in_the_body_is_the_hosts_own(database: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with watch(quiet(database)):
            raise ZeroDivisionError


async def test_a_programming_error_in_the_bridge_reaches_the_iteration(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watch(quiet(database)) as results:
        await anext(results)

        async def broken(*_: object) -> None:
            raise LookupError("a bug")

        monkeypatch.setattr(Bridge, "_serve", broken)
        results.sync_now()
        with pytest.raises(LookupError, match="a bug"):
            await anext(results)


async def test_a_buffer_of_nothing_is_refused(database: Path) -> None:
    with pytest.raises(ValueError, match="buffer"):
        watch(quiet(database), buffer=0)


# ------------------------------------------------------------------------------ look now


async def test_sync_now_from_the_loop_and_from_a_thread(database: Path) -> None:
    put(document(("new", "confirmed")), snapshot_path(database))
    Trigger().sync_now()  # nobody runs yet: of no consequence
    async with bridge(database) as results:
        assert [r.unmatched for r in results.all] == [1]
        with connect(database) as connection:
            connection.execute("INSERT INTO nodes (public_key) VALUES ('new')")
        result = await results.sync()
        assert (result.reason, result.changed_active) == ("request", 1)

        thread = threading.Thread(target=results.trigger.sync_now)
        thread.start()
        await until(lambda: len(results.all) == 3)
        assert (results.all[2].reason, results.all[2].outcome) == ("request", "unchanged")
        thread.join()
    results.trigger.sync_now()  # nobody runs any more


# ------------------------------------------------------------------------------ other hosts


async def test_ten_bridges_start_and_stop_again_and_again(tmp_path: Path) -> None:
    databases = []
    for number in range(10):
        (tmp_path / str(number)).mkdir()
        path = make_database(tmp_path / str(number) / "m.db", [("nodes", "aa11", 0, None)])
        snapshot_path(path).parent.mkdir()
        databases.append(path)
    threads, descriptors = at_rest(), len(open_descriptors())
    for turn in range(3):
        async with contextlib.AsyncExitStack() as stack:
            for database in databases:
                await stack.enter_async_context(bridge(database, mode="inotify"))
            for database in databases:
                put(document(("aa11", "confirmed", str(turn))), snapshot_path(database))
            for database in databases:
                await landed(database, str(turn))
        await until(lambda: not threads_beside(threads))
        await until(lambda: len(open_descriptors()) <= descriptors)


async def test_the_library_leaves_the_process_alone(database: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    loggers = list(logging.getLogger().handlers)
    async with bridge(database):
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert logging.getLogger().handlers == loggers
    (handler,) = logging.getLogger("mbcap_watch").handlers
    assert isinstance(handler, logging.NullHandler)


def test_outside_of_asyncio_there_is_one_clear_error(database: Path) -> None:
    with pytest.raises(EventLoopError, match="asyncio"):
        watch(quiet(database)).__aenter__().send(None)


# ------------------------------------------------------------------------------ own connection


@contextlib.asynccontextmanager
async def host_connection(database: Path, **options: Any) -> AsyncIterator[aiosqlite.Connection]:
    async with aiosqlite.connect(database, **options) as connection:
        yield connection


WANTED = Snapshot((Entry("aa11", "confirmed", "advert"), Entry("ee55", "suspected", "path")))


@each_kind_of_connection
async def test_through_the_hosts_connection(database: Path, options: dict[str, Any]) -> None:
    async with host_connection(database, **options) as connection:
        connection.row_factory = lambda _, row: {"a": row}  # type: ignore[assignment]
        before = connection.row_factory, connection.isolation_level
        pragmas = [await pragma(connection, name) for name in ("synchronous", "busy_timeout")]
        lock = asyncio.Lock()
        result = await apply_snapshot(connection, WANTED, lock=lock)

        assert (result.outcome, result.changed_active, result.changed_inactive) == ("applied", 2, 1)
        assert result.lock_seconds > 0
        assert not connection.in_transaction
        assert (connection.row_factory, connection.isolation_level) == before
        after = [await pragma(connection, name) for name in ("synchronous", "busy_timeout")]
        assert after == pragmas
        assert (await apply_snapshot(connection, WANTED, lock=lock)).outcome == "unchanged"
        assert not lock.locked()
    assert ("nodes", "aa11", 2, "advert") in read_rows(database)


async def pragma(connection: aiosqlite.Connection, name: str) -> object:
    return list(await connection.execute_fetchall(f"PRAGMA {name}"))


async def test_an_open_transaction_is_neither_used_nor_committed(database: Path) -> None:
    async with host_connection(database) as connection:
        await connection.execute("INSERT INTO nodes (public_key) VALUES ('mine')")
        assert connection.in_transaction
        with pytest.raises(TransactionOpen, match="transaction"):
            await apply_snapshot(connection, WANTED, lock=asyncio.Lock())
        assert connection.in_transaction
        assert ("nodes", "mine", 0, None) not in read_rows(database)
        await connection.rollback()


async def test_the_lock_is_given_back_between_batches(tmp_path: Path) -> None:
    keys = [f"{number:04}" for number in range(500)]
    database = make_database(tmp_path / "m.db", [("nodes", key, 0, None) for key in keys])
    snapshot = Snapshot(tuple(Entry(key, "confirmed", "x") for key in keys))
    lock = anyio.Lock()
    packets = 0
    async with host_connection(database) as connection, anyio.create_task_group() as group:

        async def ingest() -> None:
            nonlocal packets
            while True:
                async with lock:
                    await connection.execute("UPDATE nodes SET name = 'packet'")
                    await connection.commit()
                packets += 1

        group.start_soon(ingest)
        result = await apply_snapshot(connection, snapshot, lock=lock, batch_rows=10)
        group.cancel_scope.cancel()
    assert (result.outcome, result.changed_active) == ("applied", len(keys))
    assert packets > 20


async def test_busy_is_reported_at_once(database: Path) -> None:
    async with host_connection(database, timeout=0.1) as connection:
        with locked(database):
            result = await apply_snapshot(connection, WANTED, lock=asyncio.Lock())
        assert (result.outcome, connection.in_transaction) == ("busy", False)
        assert (await apply_snapshot(connection, WANTED, lock=asyncio.Lock())).outcome == "applied"


async def test_a_missing_schema_through_the_hosts_connection(database: Path) -> None:
    async with host_connection(database) as connection:
        await connection.execute("DROP TABLE nodes")
        await connection.execute("DROP TABLE inactive_nodes")
        await connection.commit()
        result = await apply_snapshot(connection, WANTED, lock=asyncio.Lock())
        assert result.outcome == "schema_missing"


async def test_a_text_factory_that_is_not_str_is_refused(database: Path) -> None:
    async with host_connection(database) as connection:
        connection.text_factory = bytes
        result = await apply_snapshot(connection, WANTED, lock=asyncio.Lock())
        assert (result.outcome, "text_factory" in str(result.error)) == ("failed", True)


@pytest.mark.parametrize(
    "name, value", [("batch_rows", 0), ("batch_rows", -1), ("downgrade", "Allow")]
)
async def test_what_no_setting_may_be_is_refused_at_once(
    database: Path, name: str, value: Any
) -> None:
    async with host_connection(database) as connection:
        with anyio.fail_after(DEADLINE), pytest.raises(SettingsError, match=f"^{name}: "):
            await apply_snapshot(connection, WANTED, lock=asyncio.Lock(), **{name: value})


# ------------------------------------------------------------------------------ types

HOST = """
import asyncio
import aiosqlite
import anyio
from functools import partial
from pathlib import Path
from mbcap_watch import (
    Entry, MbcapWatchError, PersistResult, Settings, Snapshot, SnapshotNotFound, Trigger,
    WatchState, apply_snapshot, persist_once, read_snapshot, run, watch, write_snapshot,
)

def on_result(result: PersistResult) -> None:
    outcome: str = result.outcome
    seconds: float = result.lock_seconds
    error: str | None = result.error
    print(outcome, seconds, error)

async def on_state(state: WatchState) -> None:
    print(state.mode, state.why)

async def host(database: str) -> None:
    settings = Settings(database=Path(database), poll_interval=2, downgrade="never")
    result: PersistResult = await persist_once(settings)
    trigger = Trigger()
    async with anyio.create_task_group() as group:
        await group.start(partial(run, settings, on_result=on_result, trigger=trigger))
        group.start_soon(run, settings)
        await group.start(run, settings)
        trigger.sync_now()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run(settings, on_state=on_state))
    async with aiosqlite.connect(database) as own:
        await run(settings, connection=own, lock=asyncio.Lock())
        async with watch(settings, connection=lambda: own, lock=anyio.Lock()) as results:
            print(results.state.mode)
    async with watch(settings, buffer=8) as results:
        async for result in results:
            on_result(result)
            results.sync_now()
    async with aiosqlite.connect(database) as connection:
        snapshot: Snapshot = read_snapshot(database)
        result = await apply_snapshot(connection, snapshot, lock=asyncio.Lock())
        result = await apply_snapshot(connection, snapshot, lock=anyio.Lock())
    try:
        written: Snapshot = write_snapshot(database, Snapshot((Entry("aa", "confirmed"),)))
        print(written.written_at, [entry.public_key for entry in written.entries])
    except SnapshotNotFound as exc:
        path: str = exc.path
        print(path)
    except MbcapWatchError:
        pass

WRONG: Settings = Settings(database=1, mode="sometimes")
"""


@pytest.mark.slow
def test_typical_host_code_type_checks(tmp_path: Path) -> None:
    """Against the installed package, as a host would; and what is wrong is found."""
    (tmp_path / "host.py").write_text(HOST)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "c"), "host.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 2, done.stdout
    assert all('Argument "database"' in e or 'Argument "mode"' in e for e in errors), done.stdout
