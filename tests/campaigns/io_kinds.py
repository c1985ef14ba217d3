"""What fails in the campaign `io_errors`: each kind of call, on each kind of file."""

from __future__ import annotations

import errno
from itertools import product
from typing import Final, NamedTuple

# By the patterns of fnmatch(3).
PLACES: Final = {
    "database": "*/m.db",
    "wal": "*/m.db-wal*",
    "shm": "*/m.db-shm*",
    "snapshot": "*/snapshot.json",
    "directory": "*/mbcap-snapshot",
    "answer": "*/result.json*",
    "log": "*/daemon.txt",
    "socket": "*.sock",
    "listener": "socket:*",
    "inotify": "anon_inode:inotify",
    "proc": "/proc/*",
    "any": "*",
    "init": "init",
    "poll": "poll",
    "epoll": "epoll",
}

# A network or FUSE filesystem gives any of them, for any call.
ERRORS: Final = (
    *(errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE),
    *(errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.EDQUOT, errno.EINTR, errno.ETIMEDOUT),
)
LIMITS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

FILES: Final = {
    "write": "wal database shm answer log",
    "open": "database wal shm snapshot directory answer proc",
    "read": "snapshot database wal proc",
    "list": "directory",
    "sync": "database wal",
    "truncate": "wal shm",
    "stat": "database wal shm snapshot directory answer",
    "lock": "database shm",
    "map": "shm",
    "rename": "answer socket",
    "unlink": "wal shm socket",
    "watch": "directory",
    "close": "database wal shm snapshot directory answer proc",
}
# What is no file has errors of its own.
OTHERS: Final = (
    ("open", "any", LIMITS),
    ("watch", "init", LIMITS),
    ("accept", "listener", (*LIMITS, errno.ECONNABORTED, errno.EINTR)),
    ("read", "inotify", (errno.EINTR,)),
    ("poll", "poll", (errno.EINTR,)),
    ("poll", "epoll", (errno.EINTR,)),
)

# Only the first to open the database does so, or the last to close it.
ALONE: Final = {("write", "shm"), ("truncate", "shm"), ("unlink", "wal"), ("unlink", "shm")}


class Kind(NamedTuple):
    """What fails in a round: which call, where, with which errors, and in how many of the calls."""

    call: str
    place: str
    errors: tuple[int, ...]
    pattern: str  # "each" call, or "some"
    beside: bool  # whether another process has the database open all the time


def kinds() -> list[Kind]:
    files = [(call, place, ERRORS) for call, places in FILES.items() for place in places.split()]
    disks = [(what, "disk", (0,) * len(ERRORS)) for what in ("full", "read-only")]
    ways = product((True, False), ("each", "some"))
    return [
        Kind(*what, pattern, beside)
        for beside, pattern in ways
        for what in (*files, *OTHERS, *disks)
        if (what[1] != "disk" or pattern == "each") and not (beside and what[:2] in ALONE)
    ]


KINDS: Final = kinds()
