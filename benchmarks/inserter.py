"""The neighbour: inserts a packet every millisecond, as an ingestor does, until it is told to end.

`busy_timeout` is CoreScope's 5 s. The answer to a line on standard input is every insert as
`[due, waited]` in ns; `waited` runs from the attempt until COMMIT has returned.
"""

from __future__ import annotations

import json
import select
import sqlite3
import sys
import time
from typing import Final

_PERIOD_NS: Final = 1_000_000
_INSERT: Final = "INSERT INTO packets (at, payload) VALUES (?, ?)"


def main() -> None:
    """Insert until a line comes in; then tell."""
    connection = sqlite3.connect(sys.argv[1], timeout=5.0, isolation_level=None)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("CREATE TABLE IF NOT EXISTS packets (at INTEGER, payload BLOB)")
    sys.stdout.write("true\n")
    sys.stdout.flush()
    payload = bytes(180)
    waits: list[tuple[int, int]] = []
    due = time.monotonic_ns()
    while not select.select([sys.stdin], [], [], 0)[0]:
        started = time.monotonic_ns()
        connection.execute(_INSERT, (started, payload))
        ended = time.monotonic_ns()
        waits.append((started, ended - started))
        due = max(due + _PERIOD_NS, ended)
        time.sleep(max(due - time.monotonic_ns(), 0) / 1e9)
    sys.stdout.write(json.dumps(waits) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
