"""Applying a snapshot through the host's own connection, for hosts that keep a single writer."""

from __future__ import annotations

import dataclasses
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mbcap_watch import plan, store
from mbcap_watch.database import as_database_errors, timed_transaction
from mbcap_watch.errors import DatabaseBusy, DatabaseError, DatabaseFailed, TransactionOpen
from mbcap_watch.ledger import Ledger
from mbcap_watch.report import describe
from mbcap_watch.tasks import require_asyncio, uncancelled
from mbcap_watch.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    import aiosqlite

    from mbcap_watch.result import PersistResult
    from mbcap_watch.settings import Downgrade
    from mbcap_watch.wire import Snapshot

T = TypeVar("T")

_HOSTS: Final = "the host's connection"
_HALF_READ: Final = (
    "has a cursor that was neither read to its end nor closed, and sees the database as it was when"
    " that began; nothing newer can be written through it (SQLITE_BUSY_SNAPSHOT)"
)


async def apply_snapshot(
    connection: aiosqlite.Connection,
    snapshot: Snapshot,
    *,
    lock: AbstractAsyncContextManager[Any],
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
    require_asyncio()
    started = time.perf_counter()
    ledger = Ledger()
    access = _HostConnection(connection, lock, ledger)
    try:
        async with Worker() as worker:
            targets = await worker.call(plan.targets, snapshot.entries)
    except BlockingIOError:  # without a thread, the host's loop waits for some milliseconds
        targets = plan.targets(snapshot.entries)
    error: DatabaseError | None = None
    database = Path("the host's database")
    try:
        with as_database_errors(database):
            await store.reconcile(
                access,
                database,
                targets.values,
                ledger,
                batch_rows=batch_rows,
                downgrade=downgrade,
            )
    except TransactionOpen:
        raise
    except DatabaseError as exc:
        error = exc
    seconds = time.perf_counter() - started
    result = describe("once", targets, snapshot.written_at, ledger, error, seconds)
    # Nothing is pending and nothing is tried again here: that is the host's to decide.
    return result if error is None else dataclasses.replace(result, error=error.what)


class _HostConnection:
    """The way to the rows through somebody else's connection."""

    def __init__(
        self,
        connection: aiosqlite.Connection,
        lock: AbstractAsyncContextManager[Any],
        ledger: Ledger,
    ) -> None:
        self._connection = connection
        self._lock = lock
        self._ledger = ledger

    async def fetch(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        """Return all rows of a query, as plain tuples whatever the host's row factory."""

        def fetch(connection: sqlite3.Connection) -> list[Any]:
            cursor = connection.cursor()
            try:
                cursor.row_factory = None  # of this cursor alone
                return cursor.execute(sql, parameters).fetchall()
            except sqlite3.OperationalError as exc:
                if hasattr(exc, "sqlite_errorcode"):
                    raise
                # Not SQLite but Python refused, as in `OwnConnection.fetch`. The text factory is
                # the host's, so the text is asked for as bytes.
                names = [f"c{number}" for number in range(len(cursor.description))]
                rows = cursor.execute(_as_bytes(sql, names), parameters).fetchall()
                return [tuple(map(_text, row[::2], row[1::2])) for row in rows]
            finally:
                cursor.close()

        return await self._in_one_call(fetch)

    async def write(self, sql: str, rows: list[tuple[Any, ...]]) -> int:
        """Run `sql` for each of `rows` in one transaction; return how many it changed."""

        def write(connection: sqlite3.Connection) -> int:
            cursor = connection.cursor()
            try:
                return timed_transaction(cursor, sql, rows, self._ledger)
            finally:
                cursor.close()

        return await self._in_one_call(write)

    async def _in_one_call(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run `function` on the connection's thread, holding the host's lock.

        With BEGIN, the rows and COMMIT as calls of their own, the write lock would be held across
        the host's loop for as long as it stalls. aiosqlite has no public way to do it in one (a
        test checks that the private one is there).
        """
        async with self._lock:
            self._require_idle()
            connection: Any = self._connection
            try:
                return await uncancelled(connection._execute(function, connection._conn))  # noqa: SLF001
            except sqlite3.OperationalError as exc:
                # The extended code: what is masked off tells this from a lock of somebody else's.
                if getattr(exc, "sqlite_errorcode", 0) != sqlite3.SQLITE_BUSY_SNAPSHOT:
                    raise
                raise DatabaseBusy(_HOSTS, _HALF_READ) from exc

    def _require_idle(self) -> None:
        if self._connection.in_transaction:
            raise TransactionOpen(
                _HOSTS,
                "is in a transaction; hold the lock until it has ended, and do not use"
                " autocommit=False, which is in one all the time",
            )
        if self._connection.text_factory is not str:
            raise DatabaseFailed(_HOSTS, "has a text_factory that is not str")


def _as_bytes(sql: str, names: list[str]) -> str:
    """Return a query for the same rows, with text as bytes and each column's type after it."""
    columns = [f"iif(typeof({c}) = 'text', CAST({c} AS BLOB), {c}), typeof({c})" for c in names]
    return f"WITH answer({', '.join(names)}) AS ({sql}) SELECT {', '.join(columns)} FROM answer"


def _text(value: Any, kind: str) -> Any:
    return value.decode("utf-8", "surrogateescape") if kind == "text" else value
