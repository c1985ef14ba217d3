"""What one writes first: read the file, UPDATE every row by key, in one transaction.

`python straightforward.py DATABASE` is the script that the shell loop starts: standard library
only. `synchronous = NORMAL` is what mbcap-watch sets, too, so that the disk is not compared.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from pathlib import Path

_SUP = {"confirmed": 2, "suspected": 1}


def apply(database: Path) -> None:
    """Apply the snapshot that lies beside `database`."""
    snapshot = database.parent / "mbcap-snapshot" / "snapshot.json"
    rows = [
        (_SUP[entry["status"]], entry.get("evidence", ""), entry["public_key"])
        for entry in json.loads(snapshot.read_bytes())["entries"]
        if entry["status"] in _SUP
    ]
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("PRAGMA synchronous = NORMAL")
        for table in ("nodes", "inactive_nodes"):
            connection.executemany(
                f"UPDATE {table} SET multibyte_sup = ?, multibyte_evidence = ?"
                " WHERE public_key = ?",
                rows,
            )


if __name__ == "__main__":
    apply(Path(sys.argv[1]))
