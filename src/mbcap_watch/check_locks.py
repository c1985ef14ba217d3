"""`check`, the locks of the database: who holds the write lock, who keeps the WAL growing.

None is taken: the kernel is asked who holds SQLite's locks (F_GETLK, fcntl(2)).
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mbcap_watch.check_database import place
from mbcap_watch.check_host import command_of
from mbcap_watch.finding import Finding, ok, problem, size, warning

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# For how long a lock is watched.
LOCK_SECONDS: Final = 2.0

_LARGE_WAL: Final = 64 << 20

# The bytes that stand for a lock: in -shm the writer's and the readers' (sqlite.org/
# walformat.html, "WAL Locks"); in the database PENDING, RESERVED and SHARED (SQLite's os.h).
_WAL_WRITER: Final = (120, 1)
_WAL_READERS: Final = (123, 5)
_DATABASE_LOCKS: Final = (0x40000000, 512)
_FLOCK: Final = "hhqqi4x"  # struct flock: type, whence, start, length, pid


def judge_lock(real: Path, *, wal: bool) -> Finding:
    """Judge who holds the write lock, if anybody does."""
    locks = {real: _DATABASE_LOCKS} | ({Path(f"{real}-shm"): _WAL_WRITER} if wal else {})
    if hidden := [str(path) for path in locks if path.exists() and not place(path).readable]:
        return ok("lock", f"not known: {', '.join(hidden)} may not be read")
    pid = _holder(locks, fcntl.F_RDLCK)  # only what is locked for writing is in its way
    if pid is None:
        return ok("lock", "the write lock is free")
    text = f"the database has been locked for {LOCK_SECONDS:g} s or more by {_who(pid)}"
    remedy = "end the transaction that it keeps open (a shell, a backup, a stuck ingestor), or"
    return problem("lock", text, f"{remedy} restart it; nothing is lost meanwhile")


def judge_wal(real: Path) -> Iterator[Finding]:
    """Judge what is in the WAL, and why it is still there."""
    log, shm = place(Path(f"{real}-wal")), place(Path(f"{real}-shm"))
    length = log.status.st_size if log.status else 0
    if length > _LARGE_WAL:
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
