"""A bridge that works through the host's own connection: states to wait in, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import aiosqlite
import anyio
import pytest

from mbcap_watch import run, snapshot_path, watch
from restores import remove_wal
from support import (
    Results,
    connect,
    document,
    each_kind_of_connection,
    has_landed,
    landed,
    locked,
    make_database,
    other_process,
    put,
    quiet,
    read_line,
    read_rows,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
LOOPS = ["asyncio", "uvloop"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync gives up soon on a connection that is not to be had; the next one tries again."""
    monkeypatch.setattr("mbcap_watch.bridge.lent._PATIENCE", 0.05)


class Host:
    """A single writer: its connection, the lock that it holds when it uses it, and a bridge."""

    def __init__(self, connection: aiosqlite.Connection | None) -> None:
        self.connection = connection
        self.lock = asyncio.Lock()
        self.results = Results()

    @property
    def own(self) -> aiosqlite.Connection:
        assert self.connection is not None
        return self.connection

    async def bridge(self, database: Path, **settings: Any) -> None:
        made = quiet(database, **settings)
        results = self.results
        with contextlib.suppress(asyncio.CancelledError):
            await run(
                made,
                connection=lambda: self.connection,
                lock=self.lock,
                on_result=results,
                on_state=results.states.append,
                on_timings=results.timings.append,
                trigger=results.trigger,
            )


@contextlib.asynccontextmanager
async def host(database: Path, *, timeout: float = 0.1, **settings: Any) -> AsyncIterator[Host]:
    options = settings.pop("options", {"isolation_level": None})
    async with aiosqlite.connect(database, timeout=timeout, **options) as connection:
        made = Host(connection)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(partial(made.bridge, database, **settings))
                await until(lambda: made.results.all, "the first result")
                yield made
                group.cancel_scope.cancel()
            assert not made.lock.locked()
            assert not using()
        finally:
            if made.connection not in (None, connection):
                await made.own.close()


def publish(database: Path, evidence: str) -> None:
    put(document(("aa11", "confirmed", evidence), ("bb22", "confirmed")), snapshot_path(database))


# ------------------------------------------------------------------------------ it works


@each_kind_of_connection
async def test_a_rename_lands_and_nothing_of_the_connection_is_changed(
    database: Path, options: dict[str, Any]
) -> None:
    async with host(database, options=options) as made:
        connection = made.own
        connection.row_factory = lambda _, row: {"a": row}  # type: ignore[assignment]

        async def state() -> list[object]:
            names = ("synchronous", "busy_timeout", "wal_autocheckpoint", "journal_mode")
            async with made.lock:
                rows = [await connection.execute_fetchall(f"PRAGMA {name}") for name in names]
            return [connection.row_factory, connection.isolation_level, *map(list, rows)]

        before = await state()
        publish(database, "x")
        result = await made.results.next("applied")
        assert (result.reason, result.changed_active, result.changed_inactive) == ("rename", 1, 1)
        assert await state() == before
        assert has_landed(database, "x")
        await until(lambda: made.results.timings)
        assert made.results.timings[-1].lag is not None
        assert len(made.results.timings[-1].holds) == 2
        assert made.results.state.mode == "inotify"


OPENS = """
    import asyncio, os, sys, aiosqlite
    from mbcap_watch import Entry, Settings, Snapshot, watch, write_snapshot
    database, opened = sys.argv[1], []
    def audit(event, arguments):
        if event in ("open", "sqlite3.connect") and os.fsdecode(str(arguments[0])) != "None":
            if str(arguments[0]).removesuffix("-wal").removesuffix("-shm").endswith("meshcore.db"):
                opened.append(event)
    sys.addaudithook(audit)
    async def main():
        settings = Settings(database, sweep_interval=0.05)
        async with aiosqlite.connect(database, isolation_level=None) as connection:
            lock = asyncio.Lock()
            async with watch(settings, connection=connection, lock=lock) as results:
                write_snapshot(database, Snapshot((Entry("aa11", "confirmed"),)))
                while (await anext(results)).outcome != "applied":
                    pass
                async with lock:  # as a backup that is copied over the file
                    await connection.execute("UPDATE nodes SET multibyte_sup = 0")
                while (result := await anext(results)).reason != "sweep":
                    pass
        print(result.outcome, *opened)
    asyncio.run(main())
"""


def test_no_file_of_the_database_is_opened(database: Path) -> None:
    """Closing a descriptor of it would drop the locks of the host's connection."""
    with other_process(OPENS, str(database)) as process:
        assert read_line(process) == "applied sqlite3.connect"


async def test_results_are_pulled(database: Path) -> None:
    lock = anyio.Lock()
    async with aiosqlite.connect(database) as connection:
        async with watch(quiet(database), connection=connection, lock=lock) as results:
            assert (await anext(results)).outcome == "no_snapshot"
            publish(database, "x")
            assert (await anext(results)).outcome == "applied"
        assert not lock.locked()
    assert has_landed(database, "x")


async def test_one_without_the_other_is_refused_at_once(database: Path) -> None:
    connection = aiosqlite.connect(database)
    with pytest.raises(TypeError, match="lock is missing"):
        watch(quiet(database), connection=connection)
    with pytest.raises(TypeError, match="connection is missing"):
        watch(quiet(database), lock=asyncio.Lock())
    with pytest.raises(TypeError, match="lock is missing"):
        await run(quiet(database), connection=connection)


async def test_what_cannot_be_used_is_refused_at_once(database: Path) -> None:
    locks: list[Any] = [threading.Lock(), asyncio.Lock]
    for lock in locks:
        with pytest.raises(TypeError, match="lock is of"):
            await run(quiet(database), connection=aiosqlite.connect(database), lock=lock)
    connection: Any
    with connect(database) as connection, pytest.raises(TypeError, match="connection is of"):
        watch(quiet(database), connection=connection, lock=asyncio.Lock())
    async with host(database) as made:
        async with made.lock:
            made.connection, kept = connection, made.connection
        publish(database, "x")
        result = await made.results.next("failed")
        assert "is of <class 'sqlite3.Connection'>, not one of aiosqlite" in str(result.error)
        made.connection = kept


async def test_the_host_has_its_turn_between_two_steps(tmp_path: Path) -> None:
    keys = [f"{number:05}" for number in range(10_000)]
    database = make_database(tmp_path / "m.db", [("nodes", key, 0, None) for key in keys])
    (tmp_path / "mbcap-snapshot").mkdir()
    async with host(database) as made:
        connection = made.own
        inserted = 0

        async def insert() -> None:
            nonlocal inserted
            while True:
                async with made.lock:
                    await connection.execute("UPDATE nodes SET name = 'x' WHERE rowid = 1")
                inserted += 1

        task = asyncio.create_task(insert())
        put(document(*((key, "confirmed", "x") for key in keys)), snapshot_path(database))
        result = await made.results.next("applied")
        task.cancel()
    assert result.changed == len(keys)
    assert inserted >= 40  # as many as there are batches


async def test_rows_that_other_processes_write_meanwhile_are_right(database: Path) -> None:
    """A daemon beside an embedded bridge: both do the same, and neither is in the other's way."""
    script = """
        import anyio, sys
        from mbcap_watch import Settings, run
        anyio.run(run, Settings(sys.argv[1]))
    """
    with other_process(script, str(database)):
        async with host(database, sweep_interval=0.05) as made:
            for number in range(30):
                publish(database, str(number))
                await landed(database, str(number))
                async with made.lock:
                    await made.own.execute("UPDATE nodes SET name = 'x'")
            assert not {r.outcome for r in made.results.all} & {"failed", "foreign_wal"}


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TEMP TABLE nodes AS SELECT * FROM main.nodes",
        "CREATE TEMP TABLE nodes (x)",
        "CREATE TEMP VIEW nodes AS SELECT * FROM main.nodes WHERE public_key = ''",
        "ATTACH ':memory:' AS other; CREATE TABLE other.nodes AS SELECT * FROM main.nodes",
    ],
)
async def test_other_tables_of_the_same_names_are_left_alone(database: Path, sql: str) -> None:
    async with host(database) as made:
        await made.own.executescript(sql)
        before = [*await made.own.execute_fetchall("SELECT * FROM nodes")]
        publish(database, "x")
        result = await made.results.next("applied")
        assert (result.changed, result.error) == (2, None)
        assert has_landed(database, "x")
        if "TEMP" in sql:
            assert [*await made.own.execute_fetchall("SELECT * FROM nodes")] == before


# ------------------------------------------------------------------------------ states to wait in


@pytest.mark.usefixtures("impatient")
async def test_an_open_transaction_is_waited_for(database: Path) -> None:
    async with host(database, busy_deadline=0.01) as made:
        connection = made.own
        await connection.execute("BEGIN")
        await connection.execute("INSERT INTO nodes (public_key) VALUES ('mine')")
        publish(database, "x")
        result = await made.results.next("busy")
        assert "is in a transaction" in str(result.error)
        assert connection.in_transaction
        assert ("nodes", "mine", 0, None) not in read_rows(database)
        await connection.rollback()
        await made.results.next("applied")
        assert has_landed(database, "x")


async def test_a_short_transaction_is_not_worth_telling(database: Path) -> None:
    async with host(database) as made:
        connection = made.own
        publish(database, "x")
        for _ in range(20):
            await connection.execute("BEGIN")
            await asyncio.sleep(0.01)
            await connection.commit()
            await asyncio.sleep(0.01)
        await made.results.next("applied")
        assert set(made.results.outcomes) <= {"no_snapshot", "applied"}


@pytest.mark.usefixtures("impatient")
@pytest.mark.skipif(sys.version_info < (3, 12), reason="new in 3.12")
async def test_a_connection_that_is_always_in_a_transaction(database: Path) -> None:
    async with host(database, busy_deadline=0.01, options={"autocommit": False}) as made:
        publish(database, "x")
        result = await made.results.next("busy")
        assert "autocommit=False" in str(result.error)


async def test_a_file_that_was_replaced_is_not_written_through_the_old_connection(
    database: Path, tmp_path: Path
) -> None:
    backup = make_database(tmp_path / "backup.db", [("nodes", "aa11", 0, None)])
    async with host(database) as made:
        publish(database, "x")
        await made.results.next("applied")
        os.replace(backup, database)
        remove_wal(database)
        publish(database, "y")
        result = await made.results.next("failed")
        assert "is another file now" in str(result.error)
        made.connection = await aiosqlite.connect(database, isolation_level=None)
        assert (await made.results.sync()).outcome == "applied"
        assert has_landed(database, "y")


@pytest.mark.usefixtures("impatient")
async def test_a_lock_that_is_not_free(database: Path) -> None:
    async with host(database, busy_deadline=0.01) as made:
        async with made.lock:
            publish(database, "x")
            result = await made.results.next("busy")
            assert "its lock was not free" in str(result.error)
            assert not has_landed(database, "x")
        await made.results.next("applied")


@pytest.mark.usefixtures("impatient")
async def test_a_lock_of_another_process(database: Path) -> None:
    async with host(database, busy_deadline=0.01) as made:
        with locked(database) as release:
            publish(database, "x")
            result = await made.results.next("busy")
            assert "is locked by another connection" in str(result.error)
            release()
        await made.results.next("applied")


@pytest.mark.usefixtures("impatient")
async def test_a_cursor_that_is_half_read(database: Path) -> None:
    async with host(database, busy_deadline=0.01) as made:
        cursor = await made.own.execute("SELECT * FROM nodes")
        await cursor.fetchone()
        with connect(database, timeout=0.1) as other:  # the cursor keeps it from tidying up
            other.execute("UPDATE nodes SET name = 'x'")
        publish(database, "x")
        result = await made.results.next("busy")
        assert "cursor" in str(result.error)
        await cursor.close()
        await made.results.next("applied")


@pytest.mark.parametrize("gone", ["closed", "none", "never opened"])
async def test_a_host_that_reconnects(database: Path, gone: str) -> None:
    async with host(database, sweep_interval=0.05) as made:
        async with made.lock:
            await made.own.close()
            if gone == "none":
                made.connection = None
            elif gone == "never opened":
                made.connection = aiosqlite.connect(database)
        publish(database, "x")
        result = await made.results.next("failed")
        problem = "is not there" if gone == "none" else "is closed"
        assert f"the host's connection: {problem}" in str(result.error)
        assert not has_landed(database, "x")
        made.connection = await aiosqlite.connect(database)
        await made.results.next("applied")
        assert has_landed(database, "x")


async def test_a_backup_that_the_host_puts_in_place(database: Path, tmp_path: Path) -> None:
    """It is compared as a whole when the host has opened it, not when it was moved there."""
    keys = [f"{number:04}" for number in range(3000)]
    with connect(database) as other:
        other.execute("BEGIN")
        other.executemany("INSERT INTO nodes (public_key) VALUES (?)", zip(keys, strict=True))
        other.execute("COMMIT")
    put(document(*((key, "confirmed", "x") for key in keys)), snapshot_path(database))
    async with host(database, sweep_interval=0.05) as made:
        rows = [("nodes", key, 2, "x") for key in keys[1:]]
        backup = make_database(tmp_path / "backup.db", [("nodes", keys[0], 0, None), *rows])
        syncs = len(made.results.all)
        backup.rename(database)
        await until(lambda: len(made.results.all) > syncs, "a sync through the old connection")
        async with made.lock:
            await made.own.close()
            for side in ("-wal", "-shm"):
                database.with_name(database.name + side).unlink(missing_ok=True)
            made.connection = await aiosqlite.connect(database, isolation_level=None)
            await made.own.execute("INSERT INTO nodes (public_key) VALUES ('new')")
        await until(lambda: ("nodes", keys[0], 2, "x") in read_rows(database), "its value")


async def test_what_was_overwritten_is_found_at_the_sweep(database: Path) -> None:
    async with host(database, sweep_interval=0.05) as made:
        publish(database, "x")
        await made.results.next("applied")
        syncs = len(made.results.all)
        async with made.lock:
            await made.own.execute("UPDATE nodes SET multibyte_sup = 0")
        assert (await made.results.next("applied", after=syncs)).reason == "sweep"
        assert has_landed(database, "x")


async def test_a_loop_that_stalls_is_waited_for(database: Path) -> None:
    async with host(database) as made:
        for number in range(10):
            publish(database, str(number))
            for _ in range(10):
                time.sleep(0.01)  # whatever the bridge is doing through the connection
                await asyncio.sleep(0)
        await landed(database, "9")
        assert set(made.results.outcomes) <= {"no_snapshot", "applied"}


async def test_a_connection_that_is_closed_when_the_host_leaves(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody takes what the last step has to say, and asyncio does not complain of that."""

    class Leaving(asyncio.Lock):
        async def __aenter__(self) -> None:
            await super().__aenter__()
            await connection.close()
            leaving.cancel()

    connection = await aiosqlite.connect(database)
    publish(database, "x")
    bridge = run(quiet(database), connection=connection, lock=Leaving())
    leaving = asyncio.create_task(bridge)
    with contextlib.suppress(asyncio.CancelledError):
        await leaving
    gc.collect()
    assert not caplog.messages


async def test_a_host_that_cancels_what_uses_its_connection(database: Path) -> None:
    async with host(database) as made:
        async with made.lock:
            publish(database, "x")
            await until(using, "a wait for the lock")
            for task in using():
                task.cancel()
        await made.results.next("applied")


def using() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if "HostAccess" in repr(task)]


def test_a_loop_that_has_ended_ends_the_bridge(database: Path) -> None:
    script = """
        import aiosqlite, asyncio, os, sys, threading, time
        from mbcap_watch import Entry, Settings, Snapshot, run, write_snapshot
        database = sys.argv[1]
        loop, lock = asyncio.new_event_loop(), asyncio.Lock()

        async def main():
            connection = await aiosqlite.connect(database)
            seen = asyncio.Event()
            task = asyncio.ensure_future(run(
                Settings(database), connection=connection, lock=lock, on_result=lambda _: seen.set()
            ))
            await seen.wait()
            await lock.acquire()
            write_snapshot(database, Snapshot((Entry("aa11", "confirmed"),)))
            while not any("HostAccess" in repr(task) for task in asyncio.all_tasks()):
                await asyncio.sleep(0.01)
            return connection, task

        kept = loop.run_until_complete(main())
        loop.close()
        while any(thread.name == "mbcap-watch" for thread in threading.enumerate()):
            time.sleep(0.01)
        print("ended", flush=True)
        os._exit(0)
    """
    with other_process(script, str(database)) as process:
        assert read_line(process) == "ended"


async def test_leaving_while_the_lock_is_held(database: Path) -> None:
    lock = asyncio.Lock()
    async with aiosqlite.connect(database) as connection:
        async with watch(quiet(database), connection=connection, lock=lock):
            await lock.acquire()
            publish(database, "x")
            await until(using, "a wait for the lock")
        assert not using()
        lock.release()
    assert not has_landed(database, "x")
