"""Opening the database that others own: one connection, short transactions, errors as types."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import aiosqlite

from mbcap_watch.errors import DatabaseBusy, DatabaseError, DatabaseFailed, DatabaseMissing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator
    from pathlib import Path

    from mbcap_watch.ledger import Ledger

# A wait inside SQLite cannot be cancelled, so it is short; patience is the caller's.
BUSY_TIMEOUT: Final = 0.1


class _Connection(sqlite3.Connection):
    """A connection whose `executemany` is one short transaction, in one call.

    aiosqlite hands each call to the connection's thread. With BEGIN, the rows and COMMIT as
    calls of their own, the write lock would be held across the event loop: for as long as the
    host stalls it, and for ever if a cancellation strikes in between.
    """

    def __init__(self, database: Path, ledger: Ledger, *args: Any, **kwargs: Any) -> None:
        self._database = database
        self._ledger = ledger
        self._identity = _identity(database)
        self._tuned = False
        super().__init__(*args, **kwargs)
        try:
            self._require_same_file()
        except DatabaseError:
            self.close()
            raise

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> sqlite3.Cursor:
        self._tune()
        self.execute("BEGIN IMMEDIATE")
        started = time.perf_counter()
        try:
            self._require_same_file()
            cursor = super().executemany(sql, parameters)
            self.execute("COMMIT")
        finally:
            if self.in_transaction:
                self.execute("ROLLBACK")
            held = time.perf_counter() - started
            self._ledger.lock_seconds = max(self._ledger.lock_seconds, held)
        return cursor

    def _tune(self) -> None:
        """Do not flush to disk while holding the lock, where that is safe.

        In WAL mode `synchronous=NORMAL` cannot corrupt a database; a power cut may lose the last
        commits (https://www.sqlite.org/pragma.html#pragma_synchronous), and the look at the next
        start repeats them. It is a property of this connection, not of the database.
        """
        if not self._tuned and self.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
            self.execute("PRAGMA synchronous = NORMAL")
        self._tuned = True

    def _require_same_file(self) -> None:
        """Never write into a file that an operator has just replaced by a backup."""
        if _identity(self._database) != self._identity:
            raise DatabaseFailed(self._database, "was replaced while it was being written")


def _identity(database: Path) -> tuple[int, int]:
    try:
        status = os.stat(database)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise DatabaseMissing(database, "does not exist") from exc
    except OSError as exc:
        raise DatabaseFailed(database, f"cannot be reached: {exc.strerror}") from exc
    if not stat.S_ISREG(status.st_mode):
        raise DatabaseFailed(database, "is not a regular file")
    return status.st_dev, status.st_ino


@contextlib.asynccontextmanager
async def open_database(database: Path, ledger: Ledger) -> AsyncIterator[aiosqlite.Connection]:
    """Open read-write, without ever creating the file (https://www.sqlite.org/uri.html).

    Raises:
        DatabaseMissing, DatabaseBusy, DatabaseFailed: on the way in, or out of the block, as
            which SQLite's own errors leave it.

    """
    connection = aiosqlite.connect(
        f"file:{quote(os.fsencode(database))}?mode=rw",
        uri=True,
        timeout=BUSY_TIMEOUT,
        isolation_level=None,  # transactions begin where we say so
        factory=partial(_Connection, database, ledger),
    )
    with _as_database_errors(database):
        try:
            await connection
        except RuntimeError as exc:
            raise DatabaseFailed(database, f"no thread for its connection: {exc}") from exc
        try:
            yield connection
        finally:
            await connection.close()


@contextlib.contextmanager
def _as_database_errors(database: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours, by their code (https://www.sqlite.org/rescode.html)."""
    try:
        yield
    except sqlite3.Error as exc:
        code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise DatabaseBusy(database, "is locked by another connection") from exc
        name = getattr(exc, "sqlite_errorname", type(exc).__name__)
        raise DatabaseFailed(
            database, f"{_PROBLEMS.get(code, 'SQLite failed')} ({name}: {exc})"
        ) from exc


_PROBLEMS: Final = {
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; is it, or a -wal or -shm file, out of reach?",
    sqlite3.SQLITE_CORRUPT: "is corrupt",
    sqlite3.SQLITE_FULL: "cannot grow, the disk is full",
    sqlite3.SQLITE_IOERR: "cannot be read or written, the disk reports an error",
    sqlite3.SQLITE_NOTADB: "is not an SQLite database",
    sqlite3.SQLITE_PERM: "may not be accessed",
    sqlite3.SQLITE_READONLY: "may not be written; is it, its directory, or its -wal read-only?",
}
