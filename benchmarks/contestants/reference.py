"""The reference's own algorithm, restated in Python: row by row, in one deferred transaction.

CoreScope's ingestor is written in Go. This is what it does, not how fast it does it there: for each
entry that is written a SELECT in `nodes`, then an UPDATE there, or else in `inactive_nodes`. The
write lock is taken by the first UPDATE. The decoding is msgspec's, as ours is, and
`synchronous = NORMAL` likewise, so that what is compared is the way of writing.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from typing import TYPE_CHECKING

import msgspec

from benchmarks.contestants.per_row import SUP, Document, Timing

if TYPE_CHECKING:
    from pathlib import Path

_FIND = "SELECT 1 FROM nodes WHERE public_key = ?"
_UPDATE = "UPDATE {} SET multibyte_sup = ?, multibyte_evidence = ? WHERE public_key = ?"


def apply(database: Path) -> Timing:
    """Apply the snapshot that lies beside `database`."""
    started = time.perf_counter()
    data = (database.parent / "mbcap-snapshot" / "snapshot.json").read_bytes()
    document = msgspec.json.decode(data, type=Document)
    locked = 0.0
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("BEGIN DEFERRED")
        for entry in document.entries:
            if entry.status not in SUP:
                continue
            key = entry.public_key
            found = connection.execute(_FIND, (key,)).fetchone()
            sql = _UPDATE.format("nodes" if found else "inactive_nodes")
            locked = locked or time.perf_counter()
            connection.execute(sql, (SUP[entry.status], entry.evidence, key))
        connection.execute("COMMIT")
        held = time.perf_counter() - locked if locked else 0.0
    return Timing(time.perf_counter() - started, held)
