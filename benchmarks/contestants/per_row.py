"""Per-row UPDATEs with `executemany` in one transaction: sqlite3, no threads, no async.

The decoding is msgspec's, as ours is, and `synchronous = NORMAL` likewise, so that what is compared
is the way of writing.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

SUP = {"confirmed": 2, "suspected": 1}


class Entry(msgspec.Struct, gc=False):
    """An entry of a snapshot."""

    public_key: str
    status: str
    evidence: str = ""


class Document(msgspec.Struct):
    """A snapshot."""

    entries: list[Entry]


class Timing(NamedTuple):
    """Seconds in all, and from BEGIN IMMEDIATE until COMMIT has returned."""

    seconds: float
    lock_seconds: float


def apply(database: Path) -> Timing:
    """Apply the snapshot that lies beside `database`."""
    started = time.perf_counter()
    data = (database.parent / "mbcap-snapshot" / "snapshot.json").read_bytes()
    document = msgspec.json.decode(data, type=Document)
    rows = [(SUP[e.status], e.evidence, e.public_key) for e in document.entries if e.status in SUP]
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("BEGIN IMMEDIATE")
        locked = time.perf_counter()
        for table in ("nodes", "inactive_nodes"):
            connection.executemany(
                f"UPDATE {table} SET multibyte_sup = ?, multibyte_evidence = ?"
                " WHERE public_key = ?",
                rows,
            )
        connection.execute("COMMIT")
        held = time.perf_counter() - locked
    return Timing(time.perf_counter() - started, held)
