"""`check`, the database from inside: its tables, its locks, and what the snapshot would change.

Nothing is written and no lock is taken. The few queries here are the doctor's own; the comparison
is the store's. The kernel is asked who holds SQLite's locks (F_GETLK, fcntl(2)).
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import sqlite3
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mbcap_watch.doctor.findings import Finding, Installation, duration, ok, size
from mbcap_watch.doctor.machine import described
from mbcap_watch.doctor.places import place
from mbcap_watch.errors import (
    QUOTED,
    DatabaseBusy,
    DatabaseError,
    ForeignWal,
    SchemaMissing,
    printable,
)
from mbcap_watch.store.native import HAS_RESET_BUG, open_to_read
from mbcap_watch.store.reconcile import Tally, reconcile
from mbcap_watch.store.steps import TABLES, preview_steps
from mbcap_watch.store.wal import Wal, is_wal_database, release

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mbcap_watch.settings import Settings
    from mbcap_watch.store.plan import Value

# How long SQLite may read.
SQL_SECONDS: Final = 8.0

# How long it may wait for a lock that keeps readers out.
BUSY_SECONDS: Final = 2.0

# For how long a lock is watched.
LOCK_SECONDS: Final = 2.0

_LARGE_WAL: Final = 64 << 20

# The bytes that stand for a lock: in -shm the writer's and the readers' (sqlite.org/
# walformat.html, "WAL Locks"); in the database PENDING, RESERVED and SHARED (SQLite's os.h).
_WAL_WRITER: Final = (120, 1)
_WAL_READERS: Final = (123, 5)
_DATABASE_LOCKS: Final = (0x40000000, 512)
_FLOCK: Final = "hhqqi4x"  # struct flock: type, whence, start, length, pid


def examine(
    installation: Installation, settings: Settings, values: Mapping[str, Value]
) -> list[Finding]:
    """Compare the database with what the snapshot wants written; judge its locks. Blocks.

    Args:
        installation: what the findings are about.
        settings: which database, and whether values may be lowered.
        values: by public key; empty if there is no usable snapshot.

    """
    real = Path(os.path.realpath(settings.database))
    file = place(real)
    if not file.regular or not file.readable or not os.path.getsize(real):
        return []  # `database` has reported it
    wal = is_wal_database(real)
    library = []
    if wal and HAS_RESET_BUG:
        library = [installation.finding("wal_reset_bug", version=sqlite3.sqlite_version)]
    lock = judge_lock(installation, real, wal=wal)
    rows = list(_read(installation, settings, dict(values), wal=wal))
    release(settings.database)
    return [
        *library,
        lock,
        *rows,
        *judge_wal(installation, real),
    ]


# ------------------------------------------------------------------------------ reading


def _read(
    installation: Installation, settings: Settings, values: dict[str, Value], *, wal: bool
) -> Iterator[Finding]:
    tally, names, counts = Tally(), [""], dict[str, int]()
    try:
        with open_to_read(settings.database, settings.wal_grace, BUSY_SECONDS) as access:
            connection = access.connection
            if access.found is Wal.LEFT_BEHIND:
                yield installation.finding("wal_unrecovered")
            deadline = time.monotonic() + SQL_SECONDS
            connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)

            def fetch(sql: str) -> list[Any]:
                return [value for (value, *_) in connection.execute(sql).fetchall()]

            names = fetch("SELECT lower(name) FROM sqlite_master WHERE type = 'table'")
            if wal:
                yield ok("journal mode", "WAL")
            else:
                yield installation.finding("not_wal", mode=fetch("PRAGMA journal_mode")[0])
            for table in sorted(set(TABLES).intersection(names)):
                [counts[table]] = fetch(f"SELECT count(*) FROM {table}")
                if (verdict := fetch(f"PRAGMA quick_check({table})")[0]) != "ok":
                    text = f"{table} is damaged: {printable(verdict, QUOTED)}"
                    yield installation.finding("corrupt", text)
            yield from _judge_triggers(installation, connection)
            steps = reconcile(
                settings.database,
                values,
                tally,
                batch_rows=settings.batch_rows,
                downgrade=settings.downgrade,
            )
            preview_steps(steps, connection)
    except SchemaMissing as exc:
        there = printable(", ".join(names[:8]), QUOTED) or "no table at all"
        yield installation.finding("schema_missing", f"{exc.problem}; there is {there}")
        return
    except DatabaseError as exc:
        yield _unusable(installation, exc)
        return
    yield _judge_tables(installation, tally, counts)
    if values and "nodes" in tally.served:
        changes, rows = tally.changed.total(), sum(counts.values())
        yield judge_preview(installation, changes, tally.unmatched, len(values), rows)


def _judge_tables(installation: Installation, tally: Tally, counts: dict[str, int]) -> Finding:
    text = ", ".join(f"{table} with {count:,} rows" for table, count in counts.items())
    if tally.waiting is None:
        return ok("tables", f"{text}, with all columns")
    text = f"{tally.waiting}; there is {text}"
    if "nodes" not in tally.served:
        return installation.finding("nodes_not_served", text)
    return installation.finding("table_waits", waiting=text)


def _unusable(installation: Installation, error: DatabaseError) -> Finding:
    """Return why the database cannot be read."""
    primary = getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF
    if not os.path.isdir("/proc/self"):
        return installation.finding("no_proc")
    if primary == sqlite3.SQLITE_INTERRUPT:
        return installation.finding("slow_database")
    if primary == sqlite3.SQLITE_READONLY:
        return installation.finding("half_written")
    code = "busy" if isinstance(error, DatabaseBusy) else getattr(error, "cause", None) or "failed"
    subject = "wal" if isinstance(error, ForeignWal) else "tables"
    # In the catalogue, these two say to run `check`.
    remedy = "check again as root, and as the user of the service; see dmesg"
    remedy = remedy if code in ("busy", "failed") else ""
    return installation.finding(code, error.what, subject=subject, remedy=remedy)


def _judge_triggers(
    installation: Installation, connection: sqlite3.Connection
) -> Iterator[Finding]:
    """Name what may refuse, or change, what is written. CoreScope's own schema has none."""
    sql = "SELECT name, tbl_name, sql FROM sqlite_master WHERE type = 'trigger'"
    query = shlex.quote("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
    for name, table, text in connection.execute(sql).fetchall():
        if table.lower() in TABLES and _ON_UPDATE.search(text):
            about = {"trigger": printable(name, QUOTED), "table": table, "query": query}
            yield installation.finding("trigger", **about)


# In SQL's syntax, what a trigger waits for stands before the first ON.
_ON_UPDATE: Final = re.compile(r"^\s*CREATE(?:(?!\bON\b).)*\bUPDATE\b", re.IGNORECASE | re.DOTALL)


def judge_preview(
    installation: Installation, changes: int, unmatched: int, wanted: int, rows: int
) -> Finding:
    """Judge what applying the snapshot would do."""
    text = f"{changes:,} rows would change; of {wanted:,} keys {unmatched:,} are in no table"
    if unmatched == wanted:
        none = "" if rows else ", which has no rows"
        text = f"not one of the {wanted:,} keys of the snapshot is in the database{none}"
        return installation.finding("no_match", text)
    if unmatched * 2 > wanted:
        return installation.finding("many_unmatched", text)
    return ok("preview", text)


# ------------------------------------------------------------------------------ locks


def judge_lock(installation: Installation, real: Path, *, wal: bool) -> Finding:
    """Judge who holds the write lock, if anybody does."""
    locks = {real: _DATABASE_LOCKS} | ({Path(f"{real}-shm"): _WAL_WRITER} if wal else {})
    if hidden := [str(path) for path in locks if path.exists() and not place(path).readable]:
        return ok("lock", f"not known: {', '.join(hidden)} may not be read")
    pid = _holder(locks, fcntl.F_RDLCK)  # only what is locked for writing is in its way
    if pid is None:
        return ok("lock", "the write lock is free")
    text = f"the database has been locked for {duration(LOCK_SECONDS)} or more by {_who(pid)}"
    remedy = "end the transaction that it keeps open (a shell, a backup, a stuck ingestor), or"
    remedy += " restart it; nothing is lost meanwhile"
    return installation.finding("busy", text, remedy=remedy)


def judge_wal(installation: Installation, real: Path) -> Iterator[Finding]:
    """Judge what is in the WAL, and why it is still there."""
    log, shm = place(Path(f"{real}-wal")), Path(f"{real}-shm")
    length = log.status.st_size if log.status else 0
    if length > _LARGE_WAL:
        pid, why = _holder({shm: _WAL_READERS}, fcntl.F_WRLCK), ""
        if pid is not None:
            why = f"; {_who(pid)} keeps a transaction open, which keeps it from being emptied"
        yield installation.finding("wal_grows", wal=log.path, size=size(length), why=why)


def _who(pid: int) -> str:
    return described(pid) if pid > 0 else "a process in another container"


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
        return None  # there is none, or `permissions` has reported it
    return None if kind == fcntl.F_UNLCK else pid
