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
from mbcap_watch.store.errors import cause_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger("mbcap_watch")

# Held from asking until the connection has its locks. Without it, one connection of this process
# could lose its locks while the question of another closes a descriptor of the same file.
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
        if not os.stat(wal).st_size:
            return Wal.EMPTY
    except FileNotFoundError:
        return Wal.ABSENT
    except OSError as exc:
        problem = f"its -wal cannot be reached: {exc.strerror}"
        raise DatabaseFailed(database, problem, cause_of(exc)) from exc
    if not hasattr(fcntl, "F_OFD_GETLK"):
        return Wal.IN_USE  # not Linux: there is no way to ask without harm
    try:
        attached, opened = _lock(shm, _SHM_ALIVE), _lock(real, _DATABASE_SHARED)
        age = time.time() - max(_changed(path) for path in (real, wal, shm))
    except OSError as exc:
        problem = f"the kernel does not say who has it open: {exc.strerror}"
        raise DatabaseFailed(database, problem, cause_of(exc)) from exc
    if attached == fcntl.F_UNLCK:
        if opened == fcntl.F_WRLCK:  # locking_mode=EXCLUSIVE needs no -shm
            raise DatabaseBusy(database, "is locked by another connection")
        if age < grace:
            problem = "its -wal was left behind by a process that has ended"
            raise ForeignWal(database, problem, "wal_left_behind")
        return Wal.LEFT_BEHIND
    if opened == fcntl.F_UNLCK:
        problem = "its -wal belongs to another file, which was replaced and is still open"
        raise ForeignWal(database, problem, "wal_replaced")
    return Wal.IN_USE


def is_wal_database(database: Path) -> bool:
    """Whether its header says that it is in WAL mode (sqlite.org/fileformat2.html, 1.3)."""
    with _descriptor(os.path.realpath(database)) as descriptor:
        header = os.pread(descriptor, 20, 0) if descriptor is not None else b""
    return header.startswith(b"SQLite format 3\0") and header[18:20] == b"\2\2"


def size(path: str) -> int:
    """Return the size of a file in bytes; 0 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _changed(path: str) -> float:
    """Return when the file was last written, replaced or renamed (its ctime); 0.0 if none is."""
    try:
        return os.stat(path).st_ctime
    except FileNotFoundError:
        return 0.0


def _lock(path: str, span: tuple[int, int]) -> int:
    """Return what kind of lock anybody, this process included, holds in `span` of the file.

    Returns:
        `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.

    """
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *span, 0)
    with _descriptor(path) as descriptor:
        if descriptor is None:
            return fcntl.F_UNLCK
        # Unlike F_GETLK, it tells of the locks of this process as well (fcntl(2)).
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
    kind: int = struct.unpack(_FLOCK, answer)[0]
    return kind


@contextlib.contextmanager
def _descriptor(path: str) -> Iterator[int | None]:
    """Have a descriptor of the file, to ask with; None if there is no file.

    Closing a descriptor drops every lock that the process holds on its file (fcntl(2), "record
    locks"). So where this process has the file open already, that descriptor serves. One that was
    opened for the question is kept where another has appeared meanwhile.
    """
    try:
        identity = _identity(os.stat(path))
    except FileNotFoundError:
        yield None
        return
    for descriptor in _open_here(identity):
        yield descriptor
        return
    try:
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        yield None
        return
    try:
        yield opened
    finally:
        if _open_here(_identity(os.fstat(opened))) == [opened]:
            os.close(opened)


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
