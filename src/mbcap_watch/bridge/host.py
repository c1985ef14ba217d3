"""Working through the host's own connection, for hosts that keep a single writer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from mbcap_watch.bridge.report import describe
from mbcap_watch.bridge.thread import in_daemon_thread, run_to_completion
from mbcap_watch.errors import (
    DatabaseBusy,
    DatabaseError,
    DatabaseFailed,
    EventLoopError,
    TransactionOpen,
    without_frames,
)
from mbcap_watch.settings import MAX_BATCH_ROWS, Settings
from mbcap_watch.store import plan
from mbcap_watch.store.errors import as_database_errors, refuses_rows
from mbcap_watch.store.reconcile import Pages, Tally, reconcile
from mbcap_watch.store.steps import (
    CHANGES,
    Query,
    Write,
    Written,
    read_page,
    run_steps,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    import aiosqlite

    from mbcap_watch.results import PersistResult
    from mbcap_watch.settings import Downgrade
    from mbcap_watch.snapshot.codec import Snapshot

T = TypeVar("T")
Lock: TypeAlias = contextlib.AbstractAsyncContextManager[Any]

# How much is read and written at a time: the host's own statements wait for a step to end.
HOST_PAGES: Final = Pages(rows=500, keys=250)
HOST_BATCH_ROWS: Final = 250

HOSTS: Final = "the host's connection"
_HALF_READ: Final = (
    "has a cursor that was neither read to its end nor closed, and sees the database as it was when"
    " that began; nothing newer can be written through it (SQLITE_BUSY_SNAPSHOT)"
)


async def apply_snapshot(
    connection: aiosqlite.Connection,
    snapshot: Snapshot,
    *,
    lock: Lock,
    batch_rows: int = 500,
    downgrade: Downgrade = "allow",
) -> PersistResult:
    """Apply a snapshot through a connection that the host keeps open.

    Compares first and writes only what differs, in batches of a transaction each, as the bridge
    does. Nothing of the connection is changed: no pragma, row factory or isolation level; its own
    busy timeout counts. What the host has begun is never committed.

    Args:
        connection: the host's, with a `text_factory` of `str`, which is the default.
        snapshot: as `read_snapshot` returns it.
        lock: what the host holds whenever it uses the connection, such as an `asyncio.Lock`; it
            is taken for each page of rows that is read and for each batch that is written, and
            given back in between. Do not hold it when calling.
        batch_rows: rows per transaction.
        downgrade: whether `suspected` may replace a stored `confirmed`. `hold` lowers nothing
            here: a single call remembers no earlier snapshot.

    Returns:
        The same as the bridge's; a busy database is reported at once, as `busy`.

    Raises:
        EventLoopError: not running on asyncio.
        SettingsError: `batch_rows` or `downgrade` is out of range.
        TransactionOpen: the connection is in a transaction although the lock was free.

    """
    asyncio_loop()
    rows = min(batch_rows, MAX_BATCH_ROWS)
    settings = Settings(os.devnull, batch_rows=rows, downgrade=downgrade)  # checks them
    started, tally = time.perf_counter(), Tally()
    try:
        desired = await in_daemon_thread(plan.desired_state, snapshot.entries)
    except BlockingIOError:  # without a thread, the host's loop waits for some milliseconds
        desired = plan.desired_state(snapshot.entries)
    error: DatabaseError | None = None
    database = Path("the host's database")
    steps = reconcile(
        database,
        desired.values,
        tally,
        batch_rows=settings.batch_rows,
        downgrade=settings.downgrade,
        pages=HOST_PAGES,
    )
    try:
        with as_database_errors(database):
            await run_steps(steps, HostAccess(lambda: connection, lock, tally))
    except TransactionOpen:
        raise
    except DatabaseError as exc:
        error = without_frames(exc)
    seconds = time.perf_counter() - started
    result = describe("once", tally, error, seconds, desired, snapshot.written_at)
    # Nothing is pending and nothing is tried again here: that is the host's to decide.
    return result if error is None else dataclasses.replace(result, error=error.what)


def asyncio_loop() -> asyncio.AbstractEventLoop:
    """Return the running loop; EventLoopError is raised where it is not asyncio's."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError as exc:
        raise EventLoopError("a connection of aiosqlite works on asyncio only") from exc


class HostAccess:
    """Runs the steps of `reconcile` over somebody else's connection, in the host's loop."""

    def __init__(
        self,
        current: Callable[[], aiosqlite.Connection | None],
        lock: Lock,
        tally: Tally,
        patience: float | None = None,
    ) -> None:
        self._current = current
        self._lock = lock
        self._tally = tally
        self._patience = patience
        self.connection: Any = None  # of aiosqlite; the one that the first step was given

    async def query(self, step: Query) -> list[Any] | plan.Page:
        """Return all rows, as plain tuples or a page, whatever the host's row factory."""
        if step.is_page:
            return await self._alone(read_page(self._fetch, step))
        return await self._alone(self._fetch(step.sql, step.parameters))

    async def write(self, step: Write) -> Written:
        """Write a batch. The wait for SQLite's lock counts as part of the hold."""
        return await self._alone(self._execute(*step.statement()))

    async def _alone(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end, holding the host's lock."""
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    async with asyncio.timeout(self._patience):
                        await stack.enter_async_context(self._lock)
                except TimeoutError as exc:
                    raise DatabaseBusy(HOSTS, "is in use: its lock was not free") from exc
                self._require_usable()
                return await run_to_completion(work)
        except sqlite3.OperationalError as exc:
            # The extended code: what is masked off tells this from a lock of somebody else's.
            if getattr(exc, "sqlite_errorcode", 0) != sqlite3.SQLITE_BUSY_SNAPSHOT:
                raise
            raise DatabaseBusy(HOSTS, _HALF_READ) from without_frames(exc)
        except (ValueError, sqlite3.ProgrammingError) as exc:
            try:
                _ = self.connection and self.connection.in_transaction
            except (ValueError, sqlite3.ProgrammingError):
                raise DatabaseFailed(HOSTS, "is closed") from exc
            raise
        finally:
            work.close()  # of no effect once it has ended

    async def _fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        async with self.connection.cursor() as cursor:
            cursor.row_factory = None  # of this cursor alone
            await cursor.execute(sql, parameters)
            return list(await cursor.fetchall())

    async def _execute(self, sql: str, parameters: list[Any]) -> Written:
        started, error = time.perf_counter(), None
        try:
            # One statement, and so one transaction: nothing is begun that could be left open.
            await (await self.connection.execute(sql, parameters)).close()
        except (sqlite3.Error, UnicodeDecodeError) as exc:
            if not refuses_rows(exc):
                raise
            error = without_frames(exc)
        self._tally.holds.append(time.perf_counter() - started)
        [(rows,)] = await self._fetch(CHANGES)
        return Written(rows, error)

    def _require_usable(self) -> None:
        connection = self._current()
        if connection is None:
            raise DatabaseFailed(HOSTS, "is not there: there is none now")
        if self.connection not in (None, connection):  # the rows that were compared are not its own
            raise DatabaseBusy(HOSTS, "was replaced by another one")
        self.connection = connection
        if connection.in_transaction:
            raise TransactionOpen(
                HOSTS,
                "is in a transaction; hold the lock until it has ended, and do not use"
                " autocommit=False, which is in one all the time",
            )
        if connection.text_factory is not str:
            raise DatabaseFailed(HOSTS, "has a text_factory that is not str")
