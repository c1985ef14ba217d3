"""Whose `-wal` is it: asked before a database is opened, for SQLite replays whatever lies there.

A backup that is put in place beside the `-wal` of the file before it is ruined by whoever opens it
next. Locks tell whose it is: a connection that lives holds a byte of the `-shm`, and a range of the
database file (SQLite's `os_unix.c`: `UNIX_SHM_DMS`, `SHARED_FIRST`, `SHARED_SIZE`). The kernel
answers for every process on the machine, those in other containers included.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import functools
import logging
import os
import sqlite3
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, Final

from mbcap_watch.errors import DatabaseBusy, DatabaseFailed, ForeignWal

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger("mbcap_watch")

# Held while asking, and until the connection that is opened then has its locks.
OPENING: Final = threading.Lock()

_SHM_ALIVE: Final = (128, 1)
_DATABASE_SHARED: Final = (1073741826, 510)
_FLOCK: Final = "hhqqi4x"  # struct flock: type, whence, start, length, pid (fcntl(2))

_MENDED: Final = {(3, 44): 6, (3, 50): 7}  # the first patch without the WAL-reset bug


def has_reset_bug(version: tuple[int, int, int]) -> bool:
    """Whether two checkpoints at the same time may lose what is in the WAL.

    SQLite 3.7.0 to 3.51.2 have the bug; it was mended in 3.44.6 and 3.50.7 as well
    (https://www.sqlite.org/wal.html, "The WAL-Reset Bug").
    """
    patch = _MENDED.get(version[:2])
    return (3, 7, 0) <= version < (3, 51, 3) and (patch is None or version[2] < patch)


HAS_RESET_BUG: Final = has_reset_bug(sqlite3.sqlite_version_info)


def warn_of_second_sqlite() -> None:
    """Warn, once a process, of another SQLite library in it.

    POSIX locks belong to the process: two libraries do not keep each other out, and the database
    is damaged (sqlite.org/howtocorrupt.html, 2.2.1).
    """
    for name in _OTHER_LIBRARIES:
        if name in sys.modules:
            _warn_once(name)


@functools.cache
def _warn_once(name: str) -> None:
    logger.warning(
        "%s is loaded beside Python's sqlite3: if both open this database in one process, it is"
        " damaged, because their locks do not keep each other out; open it with one of them only",
        name,
    )


_OTHER_LIBRARIES: Final = ("apsw", "pysqlite3", "sqlcipher3", "pysqlcipher3")


class Wal(enum.Enum):
    """What lies beside the database."""

    ABSENT = enum.auto()
    EMPTY = enum.auto()
    IN_USE = enum.auto()
    LEFT_BEHIND = enum.auto()


def require_own_wal(database: Path, grace: float) -> Wal:
    """Return what lies beside the database, if it may be opened in any mode.

    Hold `OPENING` meanwhile, and until the first read of the connection.

    Args:
        database: its path; a link is followed, as SQLite does.
        grace: seconds for which the files must have been left alone where nobody has them open.

    Raises:
        ForeignWal: SQLite would replay a `-wal` that belongs to another file, or may.
        DatabaseBusy: somebody has the database for itself alone.
        DatabaseFailed: the kernel does not say who holds the locks.

    """
    real = os.path.realpath(database)
    wal, shm = f"{real}-wal", f"{real}-shm"
    try:
        _let_go()
        status = os.stat(wal)
    except FileNotFoundError:
        return Wal.ABSENT
    except OSError as exc:
        raise DatabaseFailed(database, f"its -wal cannot be reached: {exc.strerror}") from exc
    if not status.st_size:
        return Wal.EMPTY
    if not hasattr(fcntl, "F_OFD_GETLK"):
        return Wal.IN_USE  # not Linux: there is no way to ask without harm
    try:
        attached, opened = _lock(shm, _SHM_ALIVE), _lock(real, _DATABASE_SHARED)
        # When the file was put there (ctime), and the -wal written. Who only reads changes neither,
        # but does change the -shm and, as root, the owner of the -wal.
        age = time.time() - max(os.stat(real).st_ctime, status.st_mtime)
    except OSError as exc:
        problem = f"the kernel does not say who has it open: {exc.strerror}"
        raise DatabaseFailed(database, problem) from exc
    if attached == fcntl.F_UNLCK:
        if opened == fcntl.F_WRLCK:  # locking_mode=EXCLUSIVE needs no -shm
            raise DatabaseBusy(database, "is locked by another connection")
        if abs(age) < grace:  # what is long to come was before the clock was set back
            problem = "its -wal was left behind by a process that has ended"
            raise ForeignWal(database, problem, "wal_left_behind")
        return Wal.LEFT_BEHIND
    if opened == fcntl.F_UNLCK:
        problem = "its -wal belongs to another file, which was replaced and is still open"
        raise ForeignWal(database, problem, "wal_replaced")
    return Wal.IN_USE


def is_wal_database(database: Path) -> bool:
    """Whether its header says that it is in WAL mode (sqlite.org/fileformat2.html, 1.3)."""
    descriptor = _descriptor(os.path.realpath(database))
    header = os.pread(descriptor, 20, 0) if descriptor is not None else b""
    return header.startswith(b"SQLite format 3\0") and header[18:20] == b"\2\2"


def size(path: str) -> int:
    """Return the size of a file in bytes; 0 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _lock(path: str, span: tuple[int, int]) -> int:
    """Return what kind of lock anybody, this process included, holds in `span` of the file.

    Returns:
        `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.

    """
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *span, 0)
    descriptor = _descriptor(path)
    if descriptor is None:
        return fcntl.F_UNLCK
    # Unlike F_GETLK, it tells of the locks of this process as well (fcntl(2)).
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
    kind: int = struct.unpack(_FLOCK, answer)[0]
    return kind


# Descriptors to ask with, and the path of each, by file.
KEPT: Final[dict[tuple[int, int], tuple[int, str]]] = {}


def _descriptor(path: str) -> int | None:
    """Return a descriptor of the file, to ask with; None if there is no file.

    Closing a descriptor drops every lock that the process holds on its file (fcntl(2), "record
    locks"), also one that a host's connection has got a moment ago. And what a connection has
    opened it may close at any moment. So the descriptor is one of our own, and is kept.
    """
    try:
        identity = _identity(os.stat(path))
        if identity not in KEPT:
            # O_NONBLOCK: a FIFO may stand there.
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
            opened = os.open(path, flags)
            identity = _identity(os.fstat(opened))
            KEPT[identity] = opened, path
    except FileNotFoundError:
        return None
    return KEPT[identity][0]


def _let_go() -> None:
    """Close the descriptors of files that were replaced or removed.

    At its path nobody can open such a file any more. Who has it open keeps it open.
    """
    for identity, (descriptor, path) in list(KEPT.items()):
        found = None
        with contextlib.suppress(OSError):  # a host may have closed all that it does not know
            found = _identity(os.fstat(descriptor))
        with contextlib.suppress(OSError):
            if found == identity == _identity(os.stat(path)):
                continue
        if found == identity:
            if _open_here(identity) != [descriptor]:
                continue
            os.close(descriptor)
        del KEPT[identity]


def _open_here(identity: tuple[int, int]) -> list[int]:
    """Return this process's descriptors of a file."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if _identity(os.fstat(int(name))) == identity:
                found.append(int(name))
    return found


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
