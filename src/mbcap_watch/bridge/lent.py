"""A bridge through the host's own connection: each of its steps is a task of the host's loop."""

from __future__ import annotations

import contextlib
import sqlite3
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import aiosqlite
import anyio

from mbcap_watch.bridge.host import HOSTS, HostAccess, Lock, asyncio_loop
from mbcap_watch.bridge.thread import in_other_loop
from mbcap_watch.errors import DatabaseBusy, DatabaseFailed, TransactionOpen, without_frames
from mbcap_watch.store.descriptors import identity_of
from mbcap_watch.store.errors import as_database_errors, is_busy
from mbcap_watch.store.reconcile import Tally
from mbcap_watch.store.steps import Preview, Query, Write, Written, run_steps

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

    from mbcap_watch.store import plan
    from mbcap_watch.store.steps import Steps

T = TypeVar("T")
Lendable: TypeAlias = "aiosqlite.Connection | Callable[[], aiosqlite.Connection | None]"

# The pause between two steps, in seconds: the host's own statements wait for a step to end.
_PAUSE: Final = 0.001

# How long a step waits for the host's lock, or for a transaction to end; then the sync is `busy`.
_PATIENCE: Final = 2.0
_TRANSACTION_PAUSE: Final = 0.02


class HostConnection:
    """The host's connection, which a bridge uses from its own thread, in the host's loop."""

    def __init__(self, connection: Lendable, lock: Lock) -> None:
        self._loop = asyncio_loop()
        self._connection = connection
        self._lock = lock
        self._last: Callable[[], aiosqlite.Connection | None] = lambda: None
        self._file: tuple[int, int] | None = None  # at the path, when the last sync began

    @contextlib.asynccontextmanager
    async def open(self, path: Path, tally: Tally, _: float = 0.0) -> AsyncIterator[_Lent]:
        """Lend the connection for one sync, as `store.connection.open_database` opens a file."""
        lent = _Lent(self._current, self._lock, tally, _PATIENCE)
        lent.loop, lent.last, lent.path, lent.file = self._loop, self._last(), path, self._file
        file = identity_of(path)
        with as_database_errors(path):
            yield lent
        self._last, self._file = weakref.ref(lent.connection), file

    async def preview(self, path: Path, steps: Steps) -> list[tuple[str, plan.Change]]:
        """Run only the steps that read; return, by table, what the others would have written.

        Raises:
            DatabaseFailed: this is not the connection of the last sync.

        """
        async with self.open(path, Tally()) as lent:
            preview = Preview(lent)
            await run_steps(steps, preview)
            if lent.connection is not lent.last:
                raise DatabaseFailed(HOSTS, "was replaced by another one")
            return preview.changes

    def _current(self) -> aiosqlite.Connection | None:
        lent: object = self._connection() if callable(self._connection) else self._connection
        if lent is None or isinstance(lent, aiosqlite.Connection):
            return lent
        raise DatabaseFailed(HOSTS, f"is of {type(lent)}, not one of aiosqlite")


def require_both(connection: Lendable | None, lock: Lock | None) -> None:
    """Raise TypeError if one of the two is missing, or cannot be used."""
    if (connection is None) != (lock is None):
        missing = "connection" if connection is None else "lock"
        raise TypeError(f"connection and lock go together, and {missing} is missing")
    given: object = connection
    usable = given is None or isinstance(given, aiosqlite.Connection) or callable(given)
    if not usable or isinstance(given, sqlite3.Connection):  # that can be called as well
        raise TypeError(f"connection is of {type(given)}, not one of aiosqlite, and no function")
    if not (lock is None or isinstance(lock, contextlib.AbstractAsyncContextManager)):
        raise TypeError(f"lock is of {type(lock)}, which `async with` does not take")


def lent(connection: Lendable | None, lock: Lock | None) -> HostConnection | None:
    """Return the host's connection if it gives one; None if the bridge is to open its own."""
    require_both(connection, lock)
    return None if connection is None or lock is None else HostConnection(connection, lock)


class _Lent(HostAccess):
    """As its base, from the bridge's loop: each step is a task of the host's loop."""

    loop: asyncio.AbstractEventLoop
    path: Path
    # Of the last sync: the connection, and which file was at the path.
    last: aiosqlite.Connection | None
    file: tuple[int, int] | None

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
            is_same = self.connection is not None and self.connection is self.last
            if is_same and self.file not in (None, identity_of(self.path)):
                text = "is another file now; the host's connection has the one before it open"
                raise DatabaseFailed(self.path, text)
            try:
                task = await in_other_loop(self.loop, step)
                if task.cancelled():
                    text = "was taken away: the host has cancelled the task that used it"
                    raise DatabaseBusy(HOSTS, text)
                return task.result()
            except TransactionOpen as exc:
                if time.monotonic() >= give_up:
                    raise DatabaseBusy(HOSTS, exc.problem) from exc
            except sqlite3.OperationalError as exc:
                if not is_busy(without_frames(exc)) or time.monotonic() >= give_up:
                    raise
            pause = _TRANSACTION_PAUSE
