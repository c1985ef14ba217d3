"""`check`, the database from inside: its tables, and what the snapshot would change.

Nothing is written and no lock is taken. The few queries here are the doctor's own; the comparison
is the store's.
"""

from __future__ import annotations

import os
import re
import shlex
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mbcap_watch.doctor import locks
from mbcap_watch.doctor.database import place
from mbcap_watch.doctor.findings import Finding, ok, problem, warning
from mbcap_watch.doctor.remedies import remedy
from mbcap_watch.errors import (
    QUOTED,
    DatabaseBusy,
    DatabaseError,
    ForeignWal,
    SchemaMissing,
    printable,
)
from mbcap_watch.store import schema
from mbcap_watch.store.library import HAS_RESET_BUG
from mbcap_watch.store.native import open_to_read
from mbcap_watch.store.reconcile import Tally, reconcile
from mbcap_watch.store.steps import preview_steps
from mbcap_watch.store.wal import Wal, is_wal_database, release

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mbcap_watch.settings import Settings
    from mbcap_watch.store.plan import Value

# How long SQLite may read.
SQL_SECONDS: Final = 8.0

# How long it may wait for a lock that keeps readers out.
BUSY_SECONDS: Final = 2.0


def examine(settings: Settings, values: Mapping[str, Value]) -> list[Finding]:
    """Look into the database, and hold it against what the snapshot wants written. Blocks.

    Args:
        settings: which database, and whether values may be lowered.
        values: by public key; empty if there is no usable snapshot.

    """
    real = Path(os.path.realpath(settings.database))
    if not place(real).regular or not place(real).readable or not os.path.getsize(real):
        return []  # what is wrong was said
    wal = is_wal_database(real)
    found = [*_judge_library(wal=wal), *_read(settings, dict(values), wal=wal)]
    release(settings.database)
    return [
        *found,
        locks.judge_lock(real, wal=wal),
        *locks.judge_wal(real),
    ]


# ------------------------------------------------------------------------------ reading


def _read(settings: Settings, values: dict[str, Value], *, wal: bool) -> Iterator[Finding]:
    tally, names, database = Tally(), [""], settings.database
    try:
        with open_to_read(database, settings.wal_grace, BUSY_SECONDS) as access:
            connection = access.connection
            yield from _judge_left_behind(access.found, database)
            deadline = time.monotonic() + SQL_SECONDS
            connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)

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
            for table in sorted(set(schema.TABLES).intersection(names)):
                [counts[table]] = fetch(f"SELECT count(*) FROM {table}")
                if (verdict := fetch(f"PRAGMA quick_check({table})")[0]) != "ok":
                    what = remedy("corrupt", str(database))
                    yield problem(
                        "tables", f"{table} is damaged: {printable(verdict, QUOTED)}", what
                    )
            yield from _judge_triggers(connection, database)
            steps = reconcile(
                database,
                values,
                tally,
                batch_rows=settings.batch_rows,
                downgrade=settings.downgrade,
            )
            preview_steps(steps, connection)
    except SchemaMissing as exc:
        there = printable(", ".join(names[:8]), QUOTED) or "no table at all"
        text = f"{exc.problem}; there is {there}"
        advice = (
            "" if "nodes" in names else "if it is not CoreScope's database, set the path; else "
        )
        yield problem("tables", text, advice + _UPGRADE)
        return
    except ForeignWal as exc:
        yield problem("wal", exc.what, remedy(exc.cause, str(database)))
        return
    except DatabaseError as exc:
        yield problem("tables", exc.what, _what_to_do(exc, settings))
        return
    text = ", ".join(f"{table} with {count:,} rows" for table, count in counts.items())
    if tally.waiting:
        yield warning("tables", f"{tally.waiting}; there is {text}", _UPGRADE)
    else:
        yield ok("tables", f"{text}, with all columns")
    if values:
        changes, nodes = tally.changed.total(), sum(counts.values())
        yield judge_preview(changes, tally.unmatched, len(values), nodes)


def _judge_library(*, wal: bool) -> Iterator[Finding]:
    if wal and HAS_RESET_BUG:
        text = (
            f"SQLite {sqlite3.sqlite_version} has the WAL-reset bug: two programs that checkpoint"
        )
        text += " at the same moment may lose rows, or damage the database"
        advice = "use a Python whose SQLite is 3.51.3, 3.50.7, 3.44.6 or later, and so in CoreScope"
        yield warning("sqlite", text, f"{advice} (sqlite.org/wal.html, 11)")


def _judge_left_behind(found: Wal, database: Path) -> Iterator[Finding]:
    if found is Wal.LEFT_BEHIND:
        text = f"{database}-wal was left behind by a process that has ended"
        yield warning("wal", text, "start CoreScope, which recovers it; never delete it")


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
        if table.lower() in schema.TABLES and _ON_UPDATE.search(text):
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
