"""The least that can do the job: one thread, raw inotify, one connection kept open.

`python -m benchmarks.contestants.bare DATABASE`. It reads, decodes (msgspec, as we do), compares
with both tables and writes the rows that differ, in one transaction. It has no answer to a lost
watch, a torn file, a locked or replaced database or a missing table: it is the floor, not a rival.
"""

from __future__ import annotations

import ctypes
import os
import sqlite3
import sys
from pathlib import Path

import msgspec

_IN_MOVED_TO = 0x80
_SUP = {"confirmed": 2, "suspected": 1}


class _Entry(msgspec.Struct, gc=False):
    public_key: str
    status: str
    evidence: str = ""


class _Document(msgspec.Struct):
    entries: list[_Entry]


def main(database: Path) -> None:
    """Serve `database` until killed; say "ready" once armed."""
    snapshot = database.parent / "mbcap-snapshot" / "snapshot.json"
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA synchronous = NORMAL")
    libc = ctypes.CDLL(None, use_errno=True)
    inotify = libc.inotify_init1(os.O_CLOEXEC)
    if libc.inotify_add_watch(inotify, os.fsencode(snapshot.parent), _IN_MOVED_TO) < 0:
        raise OSError(ctypes.get_errno(), "inotify_add_watch")
    decoder = msgspec.json.Decoder(_Document)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        if b"snapshot.json\0" in os.read(inotify, 1 << 16):
            _apply(connection, decoder.decode(snapshot.read_bytes()))


def _apply(connection: sqlite3.Connection, document: _Document) -> None:
    values = {e.public_key: (_SUP[e.status], e.evidence) for e in document.entries}
    changes = {}
    for table in ("nodes", "inactive_nodes"):
        changes[table] = [
            (*after, rowid)
            for rowid, key, sup, evidence in connection.execute(
                f"SELECT rowid, public_key, multibyte_sup, multibyte_evidence FROM {table}"
            )
            if (after := values.get(key)) is not None and after != (sup, evidence)
        ]
    connection.execute("BEGIN IMMEDIATE")
    for table, rows in changes.items():
        connection.executemany(
            f"UPDATE {table} SET multibyte_sup = ?, multibyte_evidence = ? WHERE rowid = ?", rows
        )
    connection.execute("COMMIT")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
