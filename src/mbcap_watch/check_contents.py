"""`check`, the database from inside: its tables, what the snapshot would change, its locks.

Nothing is written and no lock is taken: `_glimpse` opens the database so that no -wal and -shm are
left behind, and the kernel is asked who holds SQLite's locks (F_GETLK, fcntl(2)). The few queries
here are the doctor's own; the comparison is the store's.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import struct
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from mbcap_watch import store
from mbcap_watch.check_database import place
from mbcap_watch.check_host import command_of
from mbcap_watch.database import as_database_errors
from mbcap_watch.errors import DatabaseBusy, DatabaseError, SchemaMissing
from mbcap_watch.finding import Finding, ok, problem, size, warning
from mbcap_watch.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mbcap_watch.plan import Value
    from mbcap_watch.settings import Settings

# How long SQLite may read, and for how long a lock is watched.
SQL_SECONDS: Final = 8.0
LOCK_SECONDS: Final = 2.0

_LARGE_WAL: Final = 64 << 20

_MAGIC: Final = b"SQLite format 3\0"
_WAL_VERSION: Final = b"\x02\x02"  # bytes 18 and 19 (sqlite.org/fileformat2.html#file_format_ver)

# The bytes that stand for a lock: in -shm the writer's and the readers' (sqlite.org/
# walformat.html, "WAL Locks"); in the database PENDING, RESERVED and SHARED (SQLite's os.h).
_WAL_WRITER: Final = (120, 1)
_WAL_READERS: Final = (123, 5)
_DATABASE_LOCKS: Final = (0x40000000, 512)
_FLOCK: Final = "hhqqi4x"  # struct flock: type, whence, start, length, pid


def examine(settings: Settings, values: Mapping[str, Value]) -> list[Finding]:
    """Look into the database, and hold it against what the snapshot wants written. Blocks.

    Args:
        settings: which database, and whether values may be lowered.
        values: by public key; empty if there is no usable snapshot.

    """
    real = Path(os.path.realpath(settings.database))
    if not place(real).regular or not place(real).readable or not os.path.getsize(real):
        return []  # what is wrong was said
    # Before SQLite opens it: closing a descriptor drops all locks that the process has on a file.
    with real.open("rb") as file:
        header = file.read(100)
    wal = header.startswith(_MAGIC) and header[18:20] == _WAL_VERSION
    shared = _shared(real)
    found = list(_read(settings, dict(values), wal=wal, shared=shared))
    if shared != _shared(real):  # somebody opened it meanwhile: what was read may be torn
        found = list(_read(settings, dict(values), wal=wal, shared=not shared))
    return [*found, _judge_lock(real, Path(f"{real}-shm"), wal=wal), *_judge_wal(real)]


def _shared(real: Path) -> bool:
    return all(os.path.exists(f"{real}{side}") for side in ("-wal", "-shm"))


# ------------------------------------------------------------------------------ reading


@contextlib.contextmanager
def _glimpse(database: Path, *, immutable: bool) -> Iterator[sqlite3.Connection]:
    """Open the database for reading, so that no file appears, vanishes or changes.

    Whoever opens a WAL database creates -wal and -shm where they are missing, `mode=ro` or not.
    So it is `immutable` where they are missing: then nobody has it open (sqlite.org/uri.html). The
    last one to close a database moves the WAL into it, but not with `mode=ro` (measured).

    Raises:
        DatabaseBusy, DatabaseFailed: as SQLite's errors; SQLITE_INTERRUPT after `SQL_SECONDS`.

    """
    uri = f"file://{quote(os.fsencode(database))}?mode=ro{'&immutable=1' if immutable else ''}"
    deadline = time.monotonic() + SQL_SECONDS
    with (
        as_database_errors(database),
        contextlib.closing(sqlite3.connect(uri, uri=True, timeout=LOCK_SECONDS)) as connection,
    ):
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        connection.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
        yield connection


class _DryRun:
    """Access to the rows for `store.reconcile` that takes every write for done."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    async def fetch(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        return self._connection.execute(sql, parameters).fetchall()

    async def write(self, _: str, rows: list[tuple[Any, ...]]) -> int:
        return len(rows)


def _read(
    settings: Settings, values: dict[str, Value], *, wal: bool, shared: bool
) -> Iterator[Finding]:
    ledger, names, database = Ledger(), [""], settings.database
    try:
        with _glimpse(database, immutable=wal and not shared) as connection:

            def fetch(sql: str) -> list[Any]:
                return [value for (value, *_) in connection.execute(sql).fetchall()]

            names = fetch("SELECT lower(name) FROM sqlite_master WHERE type = 'table'")
            if wal:
                yield ok("journal mode", "WAL")
            else:
                text = f"{fetch('PRAGMA journal_mode')[0]}, not WAL: readers and writers block each"
                remedy = "let CoreScope's ingestor open it once, which sets WAL; is it CoreScope's?"
                yield warning("journal mode", f"{text} other", remedy)
            counts = {}
            for table in sorted(set(store.TABLES).intersection(names)):
                [counts[table]] = fetch(f"SELECT count(*) FROM {table}")
                if (verdict := fetch(f"PRAGMA quick_check({table})")[0]) != "ok":
                    yield problem("tables", f"{table} is damaged: {verdict}", _RESTORE)
            comparison = store.reconcile(
                _DryRun(connection),
                database,
                values,
                ledger,
                batch_rows=settings.batch_rows,
                downgrade=settings.downgrade,
            )
            asyncio.run(comparison)
    except SchemaMissing as exc:
        text = f"{exc.problem}; there is {', '.join(names[:8]) or 'no table at all'}"
        remedy = (
            "" if "nodes" in names else "if it is not CoreScope's database, set the path; else "
        )
        yield problem("tables", text, remedy + _UPGRADE)
        return
    except DatabaseError as exc:
        code = getattr(exc.__cause__, "sqlite_errorcode", 0) & 0xFF
        busy = isinstance(exc, DatabaseBusy)
        yield problem("tables", exc.what, "see lock" if busy else _REMEDIES.get(code, _ELSE))
        return
    text = ", ".join(f"{table} with {count:,} rows" for table, count in counts.items())
    if ledger.waiting:
        yield warning("tables", f"{ledger.waiting}; there is {text}", _UPGRADE)
    else:
        yield ok("tables", f"{text}, with all columns")
    if values:
        changes, nodes = ledger.changed.total(), sum(counts.values())
        yield judge_preview(changes, ledger.unmatched, len(values), nodes)


_UPGRADE: Final = (
    "upgrade CoreScope and start its ingestor, which adds what is missing; mbcap-watch never does"
)
_RESTORE: Final = (
    "stop CoreScope and mbcap-watch; restore a backup, or rescue what can be read"
    " (sqlite3 OLD .recover | sqlite3 NEW)"
)
_REMEDIES: Final = {
    sqlite3.SQLITE_NOTADB: "set the path of CoreScope's database, or restore it from a backup",
    sqlite3.SQLITE_CORRUPT: _RESTORE,
    sqlite3.SQLITE_READONLY: "a transaction was left half-way: start CoreScope, to roll it back",
    sqlite3.SQLITE_IOERR: "look for a failing disk (dmesg), or a filesystem that is not local",
    sqlite3.SQLITE_INTERRUPT: "it takes too long: look for a busy or failing disk; check again",
}
_ELSE: Final = "see permissions"


def judge_preview(changes: int, unmatched: int, wanted: int, nodes: int) -> Finding:
    """Judge what applying the snapshot would do."""
    text = f"{changes:,} rows would change; of {wanted:,} keys {unmatched:,} are in no table"
    if not nodes:
        remedy = "the database knows no node yet: is the ingestor running, and is it the right one?"
        return warning("preview", f"{text}: there are no rows", remedy)
    remedy = "do the snapshot and the database belong to the same CoreScope? See snapshot_dir"
    if unmatched == wanted:
        return problem("preview", f"{text}: none matches", remedy)
    return warning("preview", text, remedy) if unmatched * 2 > wanted else ok("preview", text)


# ------------------------------------------------------------------------------ locks


def _judge_lock(real: Path, shm: Path, *, wal: bool) -> Finding:
    locks = {real: _DATABASE_LOCKS} | ({shm: _WAL_WRITER} if wal else {})
    if hidden := [str(path) for path in locks if path.exists() and not place(path).readable]:
        return ok("lock", f"not known: {', '.join(hidden)} may not be read")
    pid = _holder(locks, fcntl.F_RDLCK)  # only what is locked for writing is in its way
    if pid is None:
        return ok("lock", "the write lock is free")
    text = f"the database has been locked for {LOCK_SECONDS:g} s or more by {_who(pid)}"
    remedy = "end the transaction that it keeps open (a shell, a backup, a stuck ingestor), or"
    return problem("lock", text, f"{remedy} restart it; nothing is lost meanwhile")


def _judge_wal(real: Path) -> Iterator[Finding]:
    log, shm = place(Path(f"{real}-wal")), place(Path(f"{real}-shm"))
    length = log.status.st_size if log.status else 0
    if length and not shm.status:
        text = f"{log.path} ({size(length)}) was left by a crash, or copied; it is not looked at"
        yield warning("wal", text, "start CoreScope, which recovers it; never delete it")
    elif length > _LARGE_WAL:
        text, remedy = f"{log.path} has grown to {size(length)}", "restart CoreScope's ingestor"
        if (pid := _holder({shm.path: _WAL_READERS}, fcntl.F_WRLCK)) is not None:
            text += f"; {_who(pid)} keeps a transaction open, which keeps it from being emptied"
            remedy = "end that transaction, or restart that process"
        yield warning("wal", text, remedy)


def _who(pid: int) -> str:
    return f"pid {pid} ({command_of(pid)})" if pid > 0 else "a process in another container"


def _holder(locks: Mapping[Path, tuple[int, int]], against: int) -> int | None:
    """Return who has one of the locks all the time for `LOCK_SECONDS`; None if they are free."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        pids = [_held(path, *span, against) for path, span in locks.items()]
        pid = next((pid for pid in pids if pid is not None), None)
        if pid is None or time.monotonic() > deadline:
            return pid
        time.sleep(0.02)


def _held(path: Path, start: int, length: int, against: int) -> int | None:
    """Return whose lock is in the way of one of the kind `against`, without taking it."""
    asked = struct.pack(_FLOCK, against, os.SEEK_SET, start, length, 0)
    try:
        with open(path, "rb") as file:
            kind, *_, pid = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except OSError:
        return None  # there is none, or `permissions` tells
    return None if kind == fcntl.F_UNLCK else pid
