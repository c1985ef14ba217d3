"""How long the write lock of a WAL database is held, seen from outside, without taking it.

In a process of its own it asks the kernel, as fast as it can, who holds the byte of the `-shm`
file that is the write lock (`WAL_WRITE_LOCK`, https://www.sqlite.org/walformat.html#wal_locks).
Two holds less than a few µs apart count as one.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import struct
import sys
import time
from typing import Final

_WRITE_LOCK_BYTE: Final = 120
_FLOCK: Final = "hhqqi4x"
_ASK: Final = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _WRITE_LOCK_BYTE, 1, 0)
_FREE: Final = struct.pack("h", fcntl.F_UNLCK)
_LOOKS_PER_TURN: Final = 500


def longest_hold(shm: int) -> float:
    """Watch until the next line on standard input; return the longest hold in seconds."""
    longest = 0
    free_at = time.monotonic_ns()
    while not select.select([sys.stdin], [], [], 0)[0]:
        for _ in range(_LOOKS_PER_TURN):
            free = fcntl.fcntl(shm, fcntl.F_GETLK, _ASK)[:2] == _FREE
            now = time.monotonic_ns()
            if free:
                free_at = now
            else:
                longest = max(longest, now - free_at)
    return longest / 1e9


def main() -> None:
    """Each line on standard input begins or ends a watch."""
    shm = os.open(sys.argv[1] + "-shm", os.O_RDWR)
    while os.read(0, 100):
        sys.stdout.write("true\n")
        sys.stdout.flush()
        seconds = longest_hold(shm)
        os.read(0, 100)
        sys.stdout.write(json.dumps(seconds) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
