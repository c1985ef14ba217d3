"""A bridge that works through the host's own connection: states to wait in, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import aiosqlite
import anyio
import pytest

from mbcap_watch import EventLoopError, run, snapshot_path, watch
from support import (
    Results,
    connect,
    document,
    locked,
    make_database,
    other_process,
    put,
    quiet,
    read_line,
    read_rows,
    until,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


class Host:
    """A single writer: its connection, the lock that it holds when it uses it, and a bridge."""

    def __init__(self, connection: aiosqlite.Connection | None) -> None:
        self.connection = connection
        self.lock = asyncio.Lock()
        self.results = Results()

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
        async with anyio.create_task_group() as group:
            group.start_soon(partial(made.bridge, database, **settings))
            await until(lambda: made.results.all, "the first result")
            yield made
            group.cancel_scope.cancel()
            assert not made.lock.locked()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not [task for task in left if "_HostAccess" in repr(task)]
        if made.connection not in (None, connection):
            await made.connection.close()  # type: ignore[union-attr]


def publish(database: Path, evidence: str) -> None:
    put(document(("aa11", "confirmed", evidence), ("bb22", "confirmed")), snapshot_path(database))


def landed(database: Path, evidence: str) -> bool:
    return ("nodes", "aa11", 2, evidence) in read_rows(database)


# ------------------------------------------------------------------------------ it works


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"isolation_level": None},
        {"isolation_level": "IMMEDIATE"},
        pytest.param(
            {"autocommit": True},
            marks=pytest.mark.skipif(sys.version_info < (3, 12), reason="new in 3.12"),
        ),
    ],
    ids=str,
)
async def test_a_rename_lands_and_nothing_of_the_connection_is_changed(
    database: Path, options: dict[str, Any]
) -> None:
    async with host(database, options=options) as made:
        connection = made.connection
        assert connection is not None
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
        assert landed(database, "x")
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
