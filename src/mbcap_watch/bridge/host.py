"""Working through the host's own connection, for hosts that keep a single writer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sqlite3
import time
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import aiosqlite
import anyio

from mbcap_watch.bridge.report import describe
from mbcap_watch.bridge.thread import in_daemon_thread, in_other_loop, run_to_completion
from mbcap_watch.errors import (
    DatabaseBusy,
    DatabaseError,
    DatabaseFailed,
    EventLoopError,
    TransactionOpen,
)
from mbcap_watch.store import plan
from mbcap_watch.store.errors import as_database_errors, is_busy, refuses_rows
from mbcap_watch.store.reconcile import Pages, Tally, reconcile
from mbcap_watch.store.steps import CHANGES, Query, Write, Written, read_page, run_steps

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from mbcap_watch.results import PersistResult
    from mbcap_watch.settings import Downgrade
    from mbcap_watch.snapshot.codec import Snapshot

T = TypeVar("T")
Lock: TypeAlias = contextlib.AbstractAsyncContextManager[Any]
Lendable: TypeAlias = "aiosqlite.Connection | Callable[[], aiosqlite.Connection | None]"

# How much is read and written at a time while a bridge uses the connection, and the pause between
# two steps, in seconds: the host's own statements wait for a step to end.
HOST_PAGES: Final = Pages(rows=500, keys=250)
HOST_BATCH_ROWS: Final = 250
_PAUSE: Final = 0.001

# How long a step waits for the host's lock, or for a transaction to end; then the sync is `busy`.
_PATIENCE: Final = 2.0
_TRANSACTION_PAUSE: Final = 0.02

_HOSTS: Final = "the host's connection"
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
        downgrade: whether `suspected` may replace a stored `confirmed`.

    Returns:
        The same as the bridge's; a busy database is reported at once, as `busy`.

    Raises:
        EventLoopError: not running on asyncio.
        TransactionOpen: the connection is in a transaction although the lock was free.

    """
    _asyncio_loop()
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
        batch_rows=batch_rows,
        downgrade=downgrade,
        pages=HOST_PAGES,
    )
    try:
        with as_database_errors(database):
            await run_steps(steps, _HostAccess(lambda: connection, lock, tally))
    except TransactionOpen:
        raise
    except DatabaseError as exc:
        error = exc
    seconds = time.perf_counter() - started
    result = describe("once", tally, error, seconds, desired, snapshot.written_at)
    # Nothing is pending and nothing is tried again here: that is the host's to decide.
    return result if error is None else dataclasses.replace(result, error=error.what)


def _asyncio_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError as exc:
        raise EventLoopError("a connection of aiosqlite works on asyncio only") from exc


class _HostAccess:
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
        # The wait for the lock counts as part of the hold: SQLite waits inside.
        return await self._alone(self._execute(*step.statement()))

    async def _alone(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end, holding the host's lock."""
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    async with asyncio.timeout(self._patience):
                        await stack.enter_async_context(self._lock)
                except TimeoutError as exc:
                    raise DatabaseBusy(_HOSTS, "is in use: its lock was not free") from exc
                self._require_usable()
                return await run_to_completion(work)
        except sqlite3.OperationalError as exc:
            # The extended code: what is masked off tells this from a lock of somebody else's.
            if getattr(exc, "sqlite_errorcode", 0) != sqlite3.SQLITE_BUSY_SNAPSHOT:
                raise
            raise DatabaseBusy(_HOSTS, _HALF_READ) from exc
        except (ValueError, sqlite3.ProgrammingError) as exc:
            try:
                _ = self.connection and self.connection.in_transaction
            except (ValueError, sqlite3.ProgrammingError):
                raise DatabaseFailed(_HOSTS, "is closed") from exc
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
            error = exc.with_traceback(None)
        self._tally.holds.append(time.perf_counter() - started)
        [(rows,)] = await self._fetch(CHANGES)
        return Written(rows, error)

    def _require_usable(self) -> None:
        connection = self._current()
        if connection is None:
            raise DatabaseFailed(_HOSTS, "is not there: there is none now")
        if self.connection not in (None, connection):  # the rows that were compared are not its own
            raise DatabaseBusy(_HOSTS, "was replaced by another one")
        self.connection = connection
        if connection.in_transaction:
            raise TransactionOpen(
                _HOSTS,
                "is in a transaction; hold the lock until it has ended, and do not use"
                " autocommit=False, which is in one all the time",
            )
        if connection.text_factory is not str:
            raise DatabaseFailed(_HOSTS, "has a text_factory that is not str")


# ------------------------------------------------------------------------------ for a bridge


class HostConnection:
    """The host's connection, which a bridge uses from its own thread, in the host's loop."""

    def __init__(self, connection: Lendable, lock: Lock) -> None:
        self._loop = _asyncio_loop()
        self._connection = connection
        self._lock = lock
        self._last: Callable[[], aiosqlite.Connection | None] = lambda: None

    @contextlib.asynccontextmanager
    async def open(self, path: Path, tally: Tally, _: float = 0.0) -> AsyncIterator[_Lent]:
        """Lend the connection for one sync, as `store.connection.open_database` opens a file."""
        lent = _Lent(self._current, self._lock, tally, _PATIENCE)
        lent.loop, lent.last = self._loop, self._last()
        with as_database_errors(path):
            yield lent
        self._last = weakref.ref(lent.connection)

    def _current(self) -> aiosqlite.Connection | None:
        lent = self._connection
        return lent if isinstance(lent, aiosqlite.Connection) else lent()


def require_both(connection: Lendable | None, lock: Lock | None) -> None:
    """Raise TypeError if one of the two is missing."""
    if (connection is None) != (lock is None):
        missing = "connection" if connection is None else "lock"
        raise TypeError(f"connection and lock go together, and {missing} is missing")


def lent(connection: Lendable | None, lock: Lock | None) -> HostConnection | None:
    """Return the host's connection if it gives one; None if the bridge is to open its own."""
    require_both(connection, lock)
    return None if connection is None or lock is None else HostConnection(connection, lock)


class _Lent(_HostAccess):
    """As its base, from the bridge's loop: each step is a task of the host's loop."""

    loop: asyncio.AbstractEventLoop
    last: aiosqlite.Connection | None  # that of the last sync

    async def query(self, step: Query) -> list[Any] | plan.Page:
        return await self._run(partial(super().query, step))

    async def write(self, step: Write) -> Written:
        written = await self._run(partial(super().write, step))
        self._tally.committed_at = time.time()
        return written

    async def _run(self, step: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a step; try again for a while if somebody is in the midst of a transaction."""
        give_up, pause = time.monotonic() + _PATIENCE, _PAUSE
        while True:
            await anyio.sleep(pause)
            try:
                task = await in_other_loop(self.loop, step)
                if task.cancelled():
                    text = "was taken away: the host has cancelled the task that used it"
                    raise DatabaseBusy(_HOSTS, text)
                return task.result()
            except TransactionOpen as exc:
                if time.monotonic() >= give_up:
                    raise DatabaseBusy(_HOSTS, exc.problem) from exc
            except sqlite3.OperationalError as exc:
                if not is_busy(exc) or time.monotonic() >= give_up:
                    raise
            pause = _TRANSACTION_PAUSE
