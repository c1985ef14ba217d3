"""`check`, the database from inside: its tables, and what the snapshot would change.

Nothing is written and no lock is taken: `_glimpse` opens the database so that no -wal and -shm are
left behind. The few queries here are the doctor's own; the comparison is the store's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from mbcap_watch import check_locks, store
from mbcap_watch.check_database import place
from mbcap_watch.database import as_database_errors
from mbcap_watch.errors import QUOTED, DatabaseBusy, DatabaseError, SchemaMissing, printable
from mbcap_watch.finding import Finding, ok, problem, warning
from mbcap_watch.ledger import Ledger
from mbcap_watch.remedies import remedy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mbcap_watch.plan import Value
    from mbcap_watch.settings import Settings

# How long SQLite may read.
SQL_SECONDS: Final = 8.0

# How long it may wait for a lock that keeps readers out.
BUSY_SECONDS: Final = 2.0

_MAGIC: Final = b"SQLite format 3\0"
_WAL_VERSION: Final = b"\x02\x02"  # bytes 18 and 19 (sqlite.org/fileformat2.html#file_format_ver)


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
    return [*found, check_locks.judge_lock(real, wal=wal), *check_locks.judge_wal(real)]


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
        contextlib.closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)) as connection,
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
                advice = "let CoreScope's ingestor open it once, which sets WAL; is it CoreScope's?"
                yield warning("journal mode", f"{text} other", advice)
            counts = {}
            for table in sorted(set(store.TABLES).intersection(names)):
                [counts[table]] = fetch(f"SELECT count(*) FROM {table}")
                if (verdict := fetch(f"PRAGMA quick_check({table})")[0]) != "ok":
                    what = remedy("corrupt", str(database))
                    yield problem(
                        "tables", f"{table} is damaged: {printable(verdict, QUOTED)}", what
                    )
            yield from _judge_triggers(connection, database)
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
        there = printable(", ".join(names[:8]), QUOTED) or "no table at all"
        text = f"{exc.problem}; there is {there}"
        advice = (
            "" if "nodes" in names else "if it is not CoreScope's database, set the path; else "
        )
        yield problem("tables", text, advice + _UPGRADE)
        return
    except DatabaseError as exc:
        yield problem("tables", exc.what, _what_to_do(exc, settings))
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
_REMEDIES: Final = {
    sqlite3.SQLITE_READONLY: "a transaction was left half-way: start CoreScope, to roll it back",
    sqlite3.SQLITE_INTERRUPT: "it takes too long: look for a busy or failing disk; check again",
}


def _what_to_do(error: DatabaseError, settings: Settings) -> str:
    if isinstance(error, DatabaseBusy):
        return "see lock"
    code = getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF
    if code in _REMEDIES:
        return _REMEDIES[code]
    if cause := getattr(error, "cause", None):
        return remedy(cause, str(settings.database), str(settings.snapshot_dir))
    return "see permissions"


def _judge_triggers(connection: sqlite3.Connection, database: Path) -> Iterator[Finding]:
    """Name what may refuse, or change, what is written. CoreScope's own schema has none."""
    sql = "SELECT name, tbl_name, sql FROM sqlite_master WHERE type = 'trigger'"
    for name, table, text in connection.execute(sql).fetchall():
        if table.lower() in store.TABLES and _ON_UPDATE.search(text):
            look = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
            advice = f"see what it does: sqlite3 -readonly {shlex.quote(str(database))}"
            advice += f" {shlex.quote(look)}; DROP TRIGGER if it has no business there"
            what = f"the trigger {printable(name, QUOTED)} runs at each update of {table}, and may"
            what += " refuse it"
            yield warning("triggers", what, advice)


# In SQL's syntax, what a trigger waits for stands before the first ON.
_ON_UPDATE: Final = re.compile(r"^\s*CREATE(?:(?!\bON\b).)*\bUPDATE\b", re.IGNORECASE | re.DOTALL)


def judge_preview(changes: int, unmatched: int, wanted: int, nodes: int) -> Finding:
    """Judge what applying the snapshot would do."""
    text = f"{changes:,} rows would change; of {wanted:,} keys {unmatched:,} are in no table"
    if not nodes:
        advice = "the database knows no node yet: is the ingestor running, and is it the right one?"
        return warning("preview", f"{text}: there are no rows", advice)
    advice = "do the snapshot and the database belong to the same CoreScope? See snapshot_dir"
    if unmatched == wanted:
        return problem("preview", f"{text}: none matches", advice)
    return warning("preview", text, advice) if unmatched * 2 > wanted else ok("preview", text)
