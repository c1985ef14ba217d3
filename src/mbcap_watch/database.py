"""Opening the database that others own: one connection, short transactions, errors as types."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import threading
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import quote

import aiosqlite

from mbcap_watch import diagnosis, wal
from mbcap_watch.errors import QUOTED, DatabaseBusy, DatabaseFailed, DatabaseMissing, printable
from mbcap_watch.wal import Wal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator
    from pathlib import Path

    from mbcap_watch.errors import Cause
    from mbcap_watch.ledger import Ledger

# A wait inside SQLite cannot be cancelled, so it is short; patience is the caller's.
BUSY_TIMEOUT: Final = 0.1


# Rows between two checkpoints: about the 1,000 pages after which SQLite does it by itself.
CHECKPOINT_ROWS: Final = 10_000

# A WAL that has grown to this size is due for one as well: perhaps nobody else does it. It keeps
# its size when it is filled anew from the start, so only growth tells that it is full.
CHECKPOINT_BYTES: Final = 4 << 20

# How often, and after which pauses, emptying the WAL is tried while somebody reads from it.
_EMPTY_PAUSES: Final = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.2)

# For this share of a batch's hold the lock is left alone after it. Other writers try again at
# growing intervals, and miss a gap that is too short: the wait of one that inserts every
# millisecond (p99) is 22 to 34 ms without, 9 to 18 ms with half of this, and 10 ms with it.
PAUSE_SHARE: Final = 0.4
_LARGE_BATCH: Final = 100  # rows; what is smaller is in nobody's way


class Access(Protocol):
    """How the store reaches the rows: through a connection of its own, or the host's."""

    async def fetch(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        """Return all rows of a query, as plain tuples."""

    async def write(self, sql: str, rows: list[tuple[Any, ...]]) -> int:
        """Run `sql` for each of `rows` in one short transaction; return how many it changed."""


class OwnConnection:
    """A connection that lives for one apply."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection

    async def fetch(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        """Fetch all rows at once: a cursor that is not read to its end pins the WAL."""
        try:
            return list(await self._connection.execute_fetchall(sql, parameters))
        except sqlite3.OperationalError as exc:
            if hasattr(exc, "sqlite_errorcode"):
                raise
            # Not SQLite but Python refused: text in the database that is not UTF-8. Tolerating
            # that from the start would make every read take half as long again. The frames of
            # the failed call hold a cursor in the middle of its rows, which would pin the WAL.
            traceback.clear_frames(exc.__traceback__)
            self._connection.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
            return list(await self._connection.execute_fetchall(sql, parameters))

    async def write(self, sql: str, rows: list[tuple[Any, ...]]) -> int:
        """Write in one call: `_Connection` makes a transaction of it."""
        return (await self._connection.executemany(sql, rows)).rowcount


class _Connection(sqlite3.Connection):
    """A connection whose `executemany` is one short transaction, in one call.

    aiosqlite hands each call to the connection's thread. With BEGIN, the rows and COMMIT as
    calls of their own, the write lock would be held while two threads take turns, on a busy
    machine for long, and whatever struck in between would leave it held.
    """

    def __init__(
        self, database: Path, ledger: Ledger, grace: float, *args: Any, **kwargs: Any
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._identity = _identity(database)
        self._tuned = False
        self._wrote = False
        self._wal = f"{os.path.realpath(database)}-wal"
        self._unchecked = 0
        wal.warn_of_second_sqlite()
        with wal.OPENING:
            self._found = wal.require_own_wal(database, grace)
            self._wal_size = wal.size(self._wal)
            self._empties = self._found in (Wal.ABSENT, Wal.EMPTY) or ledger.owes_checkpoint
            super().__init__(*args, **kwargs)
            try:
                self._require_same_file()
                _attach(self)
            except BaseException:
                super().close()
                raise

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> sqlite3.Cursor:
        self._tune()
        self._wrote = True
        cursor = self.cursor()
        try:
            rows = timed_transaction(cursor, sql, parameters, self._ledger, self._require_same_file)
        finally:
            # A cursor that somebody still refers to, be it the traceback of an error, would keep
            # the file open after the connection is closed.
            cursor.close()
        if rows >= _LARGE_BATCH:
            time.sleep(PAUSE_SHARE * self._ledger.holds[-1])
        self._unchecked += rows
        # Two checkpoints at a time are what brings out the WAL-reset bug.
        if self._unchecked >= CHECKPOINT_ROWS and not wal.HAS_RESET_BUG:
            self._checkpoint()
        return cursor

    def close(self) -> None:
        """Close, and leave the WAL as it was found."""
        try:
            self._tidy()
        finally:
            if self._leaves_files():
                self._close_not_as_last()
            else:
                super().close()

    def _tidy(self) -> None:
        """Empty the WAL if it was empty; else leave it no larger than need be."""
        size = wal.size(self._wal)
        if self._empties and (self._wrote or self._ledger.owes_checkpoint):
            self._ledger.owes_checkpoint = size > 0 and not self._empty_wal()
        elif self._unchecked and size >= CHECKPOINT_BYTES and size > self._wal_size:
            self._checkpoint()

    def _empty_wal(self) -> bool:
        """Move what was written into the database, and cut the WAL to nothing.

        What stays in it would be replayed into a backup that is put in place now. Where a reader
        stays attached, closing alone does not do it.
        """
        self.execute("PRAGMA busy_timeout = 0").close()
        for pause in _EMPTY_PAUSES:
            time.sleep(pause)
            # The first does the slow part, without the write lock; the second cuts.
            self._checkpoint()
            with contextlib.suppress(sqlite3.Error):
                self.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
            if not wal.size(self._wal):
                return True
        return False

    def _leaves_files(self) -> bool:
        """Whether -wal and -shm stay, even if this is the last connection.

        SQLite's last connection moves the WAL into the database and removes it. That is right
        for what this connection made, and for what an ingestor left that closed meanwhile. It is
        wrong for an empty -wal that was there before: a read-only server that opens the database
        at this moment would find it locked. And whoever only reads leaves alone what a process
        that was killed left behind.
        """
        if self._found is Wal.LEFT_BEHIND:
            return not self._wrote
        return self._found is Wal.EMPTY and not wal.size(self._wal)

    def _close_not_as_last(self) -> None:
        """Close while a read-only connection is attached, which itself cannot remove anything.

        `SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE` would do the same, from Python 3.12 on.
        """
        uri = f"{_uri(self._database)}?mode=ro"
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(sqlite3.Error):
                anchor = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)
                stack.callback(anchor.close)
                _attach(anchor)
            super().close()

    def _checkpoint(self) -> None:
        """Move what was written into the database, with the lock free.

        SQLite's automatic checkpoint would do it inside COMMIT, every 1,000 pages, and make the
        longest batches ten times as long. A passive one holds up neither readers nor writers
        (https://www.sqlite.org/pragma.html#pragma_wal_checkpoint).

        If it fails, on a full disk, say, what was committed is safe in the WAL all the same, and
        it is for a later one to do. SQLite's automatic checkpoint fails in silence as well.
        """
        self._unchecked = 0
        with contextlib.suppress(sqlite3.Error):
            self.execute("PRAGMA wal_checkpoint(PASSIVE)").close()

    def _tune(self) -> None:
        """Do not flush to disk while holding the lock, where that is safe.

        In WAL mode `synchronous=NORMAL` cannot corrupt a database; a power cut may lose the last
        commits (https://www.sqlite.org/pragma.html#pragma_synchronous), and the look at the next
        start repeats them. These are properties of this connection, not of the database.
        """
        if not self._tuned and self.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
            self.execute("PRAGMA synchronous = NORMAL")
            self.execute("PRAGMA wal_autocheckpoint = 0")
        self._tuned = True

    def _require_same_file(self) -> None:
        """Never write into a file that an operator has just replaced by a backup."""
        if _identity(self._database) != self._identity:
            raise DatabaseFailed(self._database, "was replaced while it was being written")


def timed_transaction(
    cursor: sqlite3.Cursor,
    sql: str,
    rows: Iterable[Any],
    ledger: Ledger,
    require: Callable[[], None] = lambda: None,
) -> int:
    """Run `sql` for each of `rows` in one transaction; return how many rows it changed.

    Args:
        cursor: of a connection that is in no transaction.
        sql: an UPDATE.
        rows: its parameters.
        ledger: is told how long the lock was waited for, and held.
        require: raises if, with the lock held, nothing may be written after all.

    """
    connection = cursor.connection
    asked = time.perf_counter()
    try:
        connection.execute("BEGIN IMMEDIATE")
    finally:
        started = time.perf_counter()
        ledger.waits.append(started - asked)
    try:
        require()
        cursor.executemany(sql, rows)
        changed = cursor.rowcount
        connection.execute("COMMIT")
        ledger.committed_at = time.time()
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        ledger.holds.append(time.perf_counter() - started)
    return changed


def _attach(connection: sqlite3.Connection) -> None:
    """Read once: only then does SQLite open the `-wal` and take the locks that say so."""
    connection.execute("PRAGMA schema_version").fetchone()


def _uri(database: Path) -> str:
    return f"file://{quote(os.fsencode(os.path.abspath(database)))}"


def _identity(database: Path) -> tuple[int, int]:
    try:
        status = os.stat(database)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise DatabaseMissing(database, "does not exist") from exc
    except OSError as exc:
        cause: Cause = "not_permitted" if isinstance(exc, PermissionError) else "disk_error"
        raise DatabaseFailed(database, f"cannot be reached: {exc.strerror}", cause) from exc
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory, " if stat.S_ISDIR(status.st_mode) else ""
        raise DatabaseFailed(database, f"is {kind}not a regular file", "not_a_file")
    return status.st_dev, status.st_ino


@contextlib.asynccontextmanager
async def open_database(
    database: Path, ledger: Ledger, grace: float
) -> AsyncIterator[OwnConnection]:
    """Open read-write, without ever creating the file (https://www.sqlite.org/uri.html).

    Args:
        database: its path.
        ledger: what the connection writes down.
        grace: as `wal.require_own_wal`.

    Raises:
        DatabaseMissing, ForeignWal, DatabaseBusy, DatabaseFailed: on the way in, or out of the
            block, as which SQLite's own errors leave it.

    """
    threads: list[threading.Thread] = []

    def connect(*args: Any, **kwargs: Any) -> _Connection:
        threads.append(threading.current_thread())
        return _Connection(database, ledger, grace, *args, **kwargs)

    connection = aiosqlite.connect(
        f"{_uri(database)}?mode=rw",
        uri=True,
        timeout=BUSY_TIMEOUT,
        isolation_level=None,  # transactions begin where we say so
        factory=connect,
    )
    with as_database_errors(database):
        try:
            await connection
        except RuntimeError as exc:
            raise DatabaseFailed(database, f"no thread for its connection: {exc}", "limit") from exc
        except BaseException:
            # aiosqlite does not wait for the thread of a connection that failed, which would
            # then speak to a loop that may be closed.
            for thread in threads:
                thread.join()
            raise
        try:
            yield OwnConnection(connection)
        finally:
            await connection.close()


@contextlib.contextmanager
def open_to_read(database: Path, grace: float, timeout: float = BUSY_TIMEOUT) -> Iterator[ReadOnly]:
    """Open the database so that no file appears, vanishes or changes.

    Whoever opens a WAL database creates -wal and -shm where they are missing, `mode=ro` or not.
    Where one is missing, nobody has it open, and `immutable` does without (sqlite.org/uri.html).
    Any other database is locked for reading as usual.
    The last one to close a database moves the WAL into it, but not with `mode=ro` (measured).

    Args:
        database: its path.
        grace: as `wal.require_own_wal`.
        timeout: seconds to wait for a lock that keeps readers out.

    Raises:
        DatabaseMissing, ForeignWal, DatabaseFailed: as `open_database`.
        DatabaseBusy: or somebody opened the database meanwhile, so that what was read may be torn.

    """
    identity = _identity(database)
    with as_database_errors(database), contextlib.ExitStack() as stack:
        with wal.OPENING:
            found = wal.require_own_wal(database, grace)
            before = _stamp(database)
            alone = found is not Wal.LEFT_BEHIND and not _is_shared(database)
            immutable = alone and wal.is_wal_database(database)
            uri = f"{_uri(database)}?mode=ro{'&immutable=1' if immutable else ''}"
            connection = sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None)
            stack.enter_context(contextlib.closing(connection))
            if _identity(database) != identity:
                raise DatabaseFailed(database, "was replaced while it was being opened")
            _attach(connection)
        connection.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
        yield ReadOnly(connection, found)
        if immutable and (_is_shared(database) or _stamp(database) != before):
            raise DatabaseBusy(database, "was opened by another process while it was being read")


class ReadOnly:
    """Access to the rows that takes every write for done.

    Attributes:
        connection: to the database.
        found: what lay beside it.

    """

    def __init__(self, connection: sqlite3.Connection, found: Wal) -> None:
        self.connection = connection
        self.found = found

    async def fetch(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        """Return all rows of a query."""
        return self.connection.execute(sql, parameters).fetchall()

    async def write(self, _: str, rows: list[tuple[Any, ...]]) -> int:
        """Write nothing."""
        return len(rows)


def _is_shared(database: Path) -> bool:
    """Whether the files are there without which nobody can have a WAL database open."""
    real = os.path.realpath(database)
    return all(os.path.exists(f"{real}{side}") for side in ("-wal", "-shm"))


def _stamp(database: Path) -> tuple[int, int, int]:
    status = os.stat(database)
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def as_database_errors(database: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours, by their code (https://www.sqlite.org/rescode.html)."""
    try:
        yield
    except (
        UnicodeDecodeError
    ) as exc:  # see `diagnosis.message`; none of our SQL says what is not UTF-8
        text = f"is corrupt: its schema holds text that is not UTF-8 ({diagnosis.message(exc)})"
        raise DatabaseFailed(database, text, "corrupt") from exc
    except sqlite3.Error as exc:
        code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise DatabaseBusy(database, "is locked by another connection") from exc
        name = getattr(exc, "sqlite_errorname", type(exc).__name__)
        problem, cause = diagnosis.explain(database, code)
        said = printable(str(exc), QUOTED)  # a trigger's message, say
        raise DatabaseFailed(database, f"{problem} ({name}: {said})", cause) from exc
