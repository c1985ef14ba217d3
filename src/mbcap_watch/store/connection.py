"""The bridge's connection to the database that others own: one sync long, short transactions."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import sqlite3
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

import aiosqlite
import anyio

from mbcap_watch.errors import DatabaseBusy, without_frames
from mbcap_watch.limits import no_thread, require_descriptors
from mbcap_watch.store.errors import as_database_errors, is_busy, refuses_rows
from mbcap_watch.store.forks import forks
from mbcap_watch.store.native import OVERWRITTEN, Connection
from mbcap_watch.store.steps import CHANGES, Written, read_page

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from mbcap_watch.store.plan import Page
    from mbcap_watch.store.reconcile import Tally
    from mbcap_watch.store.steps import Query, Write

T = TypeVar("T")

# The pauses between attempts while another connection has the lock, and how long they go on.
BUSY_PAUSES: Final = (0.001, 0.002, 0.005, 0.010, 0.015, 0.025)
BUSY_SECONDS: Final = 0.1

# For this share of a batch's hold the lock is left alone after it, and for no longer than a
# millisecond. Other writers try again at growing intervals, and miss a gap that is too short: with
# 0.4, the 95th percentile of a neighbour's wait is three times as long (`benchmarks neighbour`).
PAUSE_SHARE: Final = 0.7
_LONGEST_PAUSE: Final = 0.001

# The database, its -wal and its -shm.
_DESCRIPTORS: Final = 3


class Database:
    """An open database: runs the steps of `reconcile`, each to its end whatever is cancelled."""

    def __init__(self, files: Connection, connection: aiosqlite.Connection, tally: Tally) -> None:
        self._files = files
        self._connection = connection
        self._tally = tally
        self._free_until = 0.0

    async def query(self, step: Query) -> list[Any] | Page:
        """Return all rows at once: a cursor that is not read to its end pins the WAL."""
        return await when_free(lambda: read_page(self._fetch, step))

    async def write(self, step: Write) -> Written:
        """Write a batch; what refuses single rows is returned, other errors are raised."""
        sql, parameters = step.statement()
        if (pause := self._free_until - time.perf_counter()) > 0:
            time.sleep(pause)  # noqa: ASYNC251 - asyncio would make a millisecond of it
        asked = started = time.perf_counter()

        async def attempt() -> Written:
            nonlocal started
            self._files.require_same_files()
            started = time.perf_counter()
            return await self._execute(sql, parameters)

        try:
            written = await when_free(attempt)
        finally:
            self._tally.waits.append(started - asked)
        ended = time.perf_counter()
        hold = ended - started
        self._tally.holds.append(hold)
        self._tally.committed_at = time.time()
        self._free_until = ended + min(PAUSE_SHARE * hold, _LONGEST_PAUSE)
        return written

    async def _fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        return list(await self._connection.execute_fetchall(sql, parameters))

    async def _execute(self, sql: str, parameters: list[Any]) -> Written:
        # Both are queued at once: beside a busy host, each turn of a thread takes milliseconds.
        done, counted = await asyncio.gather(
            self._connection.execute_fetchall(sql, parameters),
            self._connection.execute_fetchall(CHANGES),
            return_exceptions=True,
        )
        if isinstance(counted, BaseException):
            raise counted
        [(rows,)] = counted
        if not isinstance(done, BaseException):
            return Written(rows)
        if isinstance(done, (sqlite3.Error, UnicodeDecodeError)) and refuses_rows(done):
            # SQLite counts what a statement has done before RAISE(FAIL), and nothing if it was
            # undone.
            return Written(rows, without_frames(done))
        raise done


async def when_free(call: Callable[[], Awaitable[T]]) -> T:
    """Await `call()`, again and again while another connection has the lock.

    SQLite's own busy timeout is off: its waits cannot be cancelled, nor told from a hold. Only
    the pauses can be cancelled, never a call.

    Raises:
        sqlite3.OperationalError: SQLITE_BUSY or SQLITE_LOCKED for `BUSY_SECONDS`.

    """
    give_up = time.monotonic() + BUSY_SECONDS
    pauses = itertools.chain(BUSY_PAUSES, itertools.repeat(BUSY_PAUSES[-1]))
    while True:
        try:
            with anyio.CancelScope(shield=True):
                return await call()
        except sqlite3.OperationalError as exc:
            if not is_busy(without_frames(exc)) or time.monotonic() >= give_up:
                raise
        await anyio.sleep(next(pauses) * random.uniform(0.5, 1.0))


@contextlib.asynccontextmanager
async def open_database(path: Path, tally: Tally, grace: float) -> AsyncIterator[Database]:
    """Open read-write, without ever creating the file; `grace` as in `wal.require_own_wal`.

    Raises:
        DatabaseMissing, ForeignWal, DatabaseBusy, DatabaseFailed: on the way in, or out of the
            block, as which SQLite's own errors leave it.

    """
    with as_database_errors(path), forks.wait():
        require_descriptors(_DESCRIPTORS)
        opened, connection = await when_free(lambda: _connect(path, grace, tally))
        try:
            yield Database(opened, connection, tally)
        finally:
            with anyio.CancelScope(shield=True):
                await connection.close()
            tally.owes_checkpoint = opened.owes_checkpoint
        if opened.is_undone:
            raise DatabaseBusy(path, OVERWRITTEN)


async def _connect(
    path: Path, grace: float, tally: Tally
) -> tuple[Connection, aiosqlite.Connection]:
    # Opened here, and handed over: aiosqlite would leave the thread of one that fails behind.
    opened = Connection(path, grace, owes_checkpoint=tally.owes_checkpoint)
    connection = aiosqlite.connect(path, factory=lambda *_, **__: opened)
    try:
        return opened, await connection
    except RuntimeError as exc:
        opened.close()
        raise no_thread() from exc
