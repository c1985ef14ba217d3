"""The bridge's connection to the database that others own: one sync long, short transactions."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import sqlite3
import stat
import threading
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote

import aiosqlite
import anyio
import msgspec

from mbcap_watch.errors import DatabaseFailed, DatabaseMissing
from mbcap_watch.limits import require_descriptors
from mbcap_watch.store.errors import as_database_errors, is_busy, primary_code, refuses_rows
from mbcap_watch.store.native import CHECKPOINT, Connection
from mbcap_watch.store.steps import CHANGES, Written

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from mbcap_watch.errors import Cause
    from mbcap_watch.store.reconcile import Tally
    from mbcap_watch.store.steps import Query, Write

T = TypeVar("T")

# UPDATE … FROM (https://www.sqlite.org/lang_update.html).
LEAST_SQLITE: Final = (3, 33)

# The pauses between attempts while another connection has the lock, less a random part, and how
# long they go on. More patience is the caller's.
BUSY_PAUSES: Final = (0.001, 0.002, 0.005, 0.010, 0.015, 0.025)
BUSY_SECONDS: Final = 0.1

# Rows between two checkpoints: about the 1,000 pages after which SQLite does it by itself.
CHECKPOINT_ROWS: Final = 10_000

# For this share of a batch's hold the lock is left alone after it. Other writers try again at
# growing intervals, and miss a gap that is too short.
PAUSE_SHARE: Final = 0.4
_LARGE_BATCH: Final = 100  # rows; what is smaller is in nobody's way

# The database, its -wal and its -shm.
_DESCRIPTORS: Final = 3

_TEXT: Final = partial(str, encoding="utf-8", errors="surrogateescape")
_page_decoder = msgspec.json.Decoder(list[tuple[int, Any, Any, Any]])


class Database:
    """An open database: runs the steps of `reconcile`, each to its end whatever is cancelled.

    Args:
        path: of the database.
        identity: of the file that was there before it was opened.
        connection: to it.
        tally: is told how long the lock was waited for, and held.

    """

    def __init__(
        self, path: Path, identity: tuple[int, int], connection: aiosqlite.Connection, tally: Tally
    ) -> None:
        self._path = path
        self._identity = identity
        self._connection = connection
        self._tally = tally
        self._reads_text = True
        self._unchecked = 0

    async def query(self, step: Query) -> list[Any]:
        """Return all rows at once: a cursor that is not read to its end pins the WAL."""
        return await when_free(lambda: self._read(step))

    async def write(self, step: Write) -> Written:
        """Write a batch; what refuses single rows is returned, other errors are raised."""
        sql, parameters = step.statement()
        asked = started = time.perf_counter()

        async def attempt() -> Written:
            nonlocal started
            self.require_same_file()
            started = time.perf_counter()
            return await self._execute(sql, parameters)

        try:
            written = await when_free(attempt)
        finally:
            self._tally.waits.append(started - asked)
        hold = time.perf_counter() - started
        self._tally.holds.append(hold)
        self._tally.committed_at = time.time()
        self._unchecked += written.rows
        if self._unchecked >= CHECKPOINT_ROWS:
            self._unchecked = 0
            with contextlib.suppress(sqlite3.Error), anyio.CancelScope(shield=True):
                await self._connection.execute_fetchall(CHECKPOINT)
        if written.rows >= _LARGE_BATCH:
            await anyio.sleep(PAUSE_SHARE * hold)
        return written

    def require_same_file(self) -> None:
        """Never write into a file that an operator has just replaced by a backup.

        Raises:
            DatabaseMissing, DatabaseFailed: there is another file now, or none.

        """
        if _identity(self._path) != self._identity:
            raise DatabaseFailed(self._path, "was replaced while it was being written")

    async def _read(self, step: Query) -> list[Any]:
        if step.pages and self._reads_text:
            try:
                [[text]] = await self._connection.execute_fetchall(step.as_text(), step.parameters)
                return _page_decoder.decode(text)
            except (sqlite3.OperationalError, msgspec.DecodeError) as exc:
                if isinstance(exc, sqlite3.Error) and primary_code(exc) not in _NO_JSON:
                    raise
                # Text that is not UTF-8, or a BLOB. The frames of the failed call hold a cursor
                # in the middle of its rows, which would pin the WAL.
                traceback.clear_frames(exc.__traceback__)
            self._reads_text = False
            self._connection.text_factory = _TEXT
        return list(await self._connection.execute_fetchall(step.sql, step.parameters))

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
        if isinstance(done, sqlite3.Error) and refuses_rows(done):
            # SQLite counts what a statement has done before RAISE(FAIL), and nothing if it was
            # undone.
            return Written(rows, done.with_traceback(None))
        raise done


_NO_JSON: Final = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_TOOBIG)


async def when_free(call: Callable[[], Awaitable[T]]) -> T:
    """Await `call()`, again and again while another connection has the lock.

    SQLite's own busy timeout is off: its waits cannot be cancelled, nor told from a hold. Only
    the pauses can be cancelled, never a call.

    Raises:
        sqlite3.OperationalError: SQLITE_BUSY or SQLITE_LOCKED for `BUSY_SECONDS`.

    """
    give_up = time.monotonic() + BUSY_SECONDS
    for pause in itertools.chain(BUSY_PAUSES, itertools.repeat(BUSY_PAUSES[-1])):
        try:
            with anyio.CancelScope(shield=True):
                return await call()
        except sqlite3.OperationalError as exc:
            if not is_busy(exc) or time.monotonic() >= give_up:
                raise
        await anyio.sleep(pause * random.uniform(0.5, 1.0))
    raise AssertionError  # the pauses never end


@contextlib.asynccontextmanager
async def open_database(path: Path, tally: Tally) -> AsyncIterator[Database]:
    """Open read-write, without ever creating the file.

    Raises:
        DatabaseMissing, DatabaseBusy, DatabaseFailed: on the way in, or out of the block, as
            which SQLite's own errors leave it.

    """
    with as_database_errors(path):
        identity = _identity(path)
        try:
            require_descriptors(_DESCRIPTORS)
        except OSError as exc:
            raise DatabaseFailed(path, f"cannot be opened now: {exc.strerror}", "limit") from exc
        connection = await when_free(lambda: _connect(path))
        try:
            database = Database(path, identity, connection, tally)
            database.require_same_file()
            yield database
        finally:
            with anyio.CancelScope(shield=True):
                await connection.close()


@contextlib.contextmanager
def open_plainly(path: Path) -> Iterator[Connection]:
    """Open as `open_database` does, for a thread that only reads and may block."""
    _identity(path)
    with contextlib.closing(Connection(path, **_options(path), timeout=BUSY_SECONDS)) as connection:
        connection.text_factory = _TEXT
        yield connection


def _options(path: Path) -> dict[str, Any]:
    if sqlite3.sqlite_version_info < LEAST_SQLITE:
        text = f"needs SQLite {'.'.join(map(str, LEAST_SQLITE))}"
        raise DatabaseFailed(path, f"{text} or newer, and Python has {sqlite3.sqlite_version}")
    return {
        "database": f"file://{quote(os.fsencode(path))}?mode=rw",  # https://sqlite.org/uri.html
        "uri": True,
        "isolation_level": None,
    }


async def _connect(path: Path) -> aiosqlite.Connection:
    threads: list[threading.Thread] = []

    def factory(*args: Any, **kwargs: Any) -> Connection:
        threads.append(threading.current_thread())
        return Connection(path, *args, **kwargs)

    connection = aiosqlite.connect(**_options(path), timeout=0, factory=factory)
    try:
        return await connection
    except RuntimeError as exc:
        raise DatabaseFailed(path, f"no thread for its connection: {exc}", "limit") from exc
    except BaseException:
        # aiosqlite does not wait for the thread of a connection that failed.
        for thread in threads:
            thread.join()
        raise


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
