"""Whose `-wal` is it: asked before a database is opened, for SQLite replays whatever lies there.

A backup may be put in place beside the `-wal` of the old file. Whoever opens it next ruins it. But
locks tell whose the `-wal` is: a living connection holds a byte of the `-shm`, and a range of the
database file (SQLite's `os_unix.c`: `UNIX_SHM_DMS`, `SHARED_FIRST`, `SHARED_SIZE`). The kernel
answers for every process on the machine, those in other containers included.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import struct
import time
from typing import TYPE_CHECKING, Final

from mbcap_watch.errors import DatabaseBusy, DatabaseError, DatabaseFailed, ForeignWal
from mbcap_watch.store import descriptors
from mbcap_watch.store.errors import cause_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SHM_ALIVE: Final = (128, 1)
_DATABASE_SHARED: Final = (1073741826, 510)
# Only Linux answers without harm. Elsewhere a -wal is taken to be the database's own.
_CAN_ASK: Final = hasattr(fcntl, "F_OFD_GETLK")
# One file is asked about after the other, and others open and close them meanwhile. So what stands
# in the way is believed when it still does so after each of these pauses.
_PAUSES: Final = (0.01, 0.05, 0.1)
_LOOKS: Final = 5  # in 10 ms
_FLOCK: Final = "hhqqi4x"  # struct flock: type, whence, start, length, pid (fcntl(2))
# The start of the -shm: version, changes, initialized, page size, frames in the -wal, pages of the
# database; frames that are in the database, and that the last checkpoint was to move there
# (https://www.sqlite.org/walformat.html, 2.1).
_INDEX: Final = "=I4xI?xHII72xI28xI"


class Wal(enum.Enum):
    """What lies beside the database."""

    ABSENT = enum.auto()
    EMPTY = enum.auto()
    IN_USE = enum.auto()
    LEFT_BEHIND = enum.auto()


def require_own_wal(database: Path, grace: float) -> Wal:
    """Return what lies beside the database, if it may be opened in any mode.

    Hold `descriptors.opening_lock(database)` meanwhile, and until the first read of the connection.

    Args:
        database: its path; a link is followed, as SQLite does.
        grace: seconds for which the files must have been left alone where nobody has them open.

    Raises:
        ForeignWal: SQLite would replay a `-wal` that belongs to another file, or may.
        DatabaseBusy: somebody has the database for itself alone.
        DatabaseFailed: the kernel does not say who holds the locks.

    """
    for pause in _PAUSES:
        with contextlib.suppress(DatabaseError):
            return _ask(database, grace)
        time.sleep(pause)
    return _ask(database, grace)


def _ask(database: Path, grace: float) -> Wal:
    real = os.path.realpath(database)
    try:
        if not _CAN_ASK:
            return _size_of_wal(real)
        descriptors.release_replaced(database)
        if descriptors.has_removed_shm(real):
            problem = "it is open here with a -shm that was removed; restart this process"
            raise ForeignWal(database, problem, "wal_replaced")
        found = _size_of_wal(real)
        if found is Wal.IN_USE:
            return _judge(database, real, grace)
        with contextlib.suppress(PermissionError):  # SQLite may not open it either, and says so
            _require_own_files(database, real, found)
    except FileNotFoundError:  # or no longer: somebody closes the last connection just now
        return Wal.ABSENT
    except OSError as exc:
        problem = f"the kernel does not say whose its -wal is: {exc.strerror}"
        raise DatabaseFailed(database, problem, cause_of(exc)) from exc
    return found


def _size_of_wal(real: str) -> Wal:
    try:
        return Wal.IN_USE if os.stat(f"{real}-wal").st_size else Wal.EMPTY
    except FileNotFoundError:
        return Wal.ABSENT


def _judge(database: Path, real: str, grace: float) -> Wal:
    """Tell by the locks whose the `-wal` is; raise as `require_own_wal`, or an OSError."""
    attached = _held_lock(database, f"{real}-shm", _SHM_ALIVE)
    opened = _held_lock(database, real, _DATABASE_SHARED)
    # When the database was put there (ctime), and its -wal written (mtime). A reader changes
    # neither time. It changes the -shm and, as root, the owner of the -wal.
    age = time.time() - max(os.stat(real).st_ctime, os.stat(f"{real}-wal").st_mtime)
    if attached == fcntl.F_UNLCK:
        if opened == fcntl.F_WRLCK:  # locking_mode=EXCLUSIVE needs no -shm
            raise DatabaseBusy(database, "is locked by another connection")
        _require_none_elsewhere(database, real)
        if abs(age) < grace:  # if the clock was set back, an old time lies in the future
            problem = "its -wal was left behind by a process that has ended"
            raise ForeignWal(database, problem, "wal_left_behind")
        return Wal.LEFT_BEHIND
    if opened == fcntl.F_UNLCK:
        problem = "its -wal belongs to another file, which was replaced and is still open"
        raise ForeignWal(database, problem, "wal_replaced")
    if not os.stat(real).st_size:  # SQLite would remove the -wal
        raise _copied_over(database, "it is empty")
    return Wal.IN_USE


def _require_none_elsewhere(database: Path, real: str) -> None:
    """Raise ForeignWal if somebody has the database open, and there is no `-shm` beside it.

    While it is being opened, that is so for a moment. A server on a mount that is read-only has it
    open without a lock of the `-shm` that is there.
    """
    for _ in range(_LOOKS):
        if os.path.exists(f"{real}-shm"):
            return
        if _held_lock(database, real, _DATABASE_SHARED) != fcntl.F_RDLCK:
            return
        time.sleep(_PAUSES[0] / _LOOKS)
    raise _elsewhere(database)


def _elsewhere(database: Path) -> ForeignWal:
    problem = "somebody has it open with a -wal that is not beside it"
    return ForeignWal(database, problem, "wal_elsewhere")


def _copied_over(database: Path, sign: str) -> ForeignWal:
    problem = f"another file was copied over it while it is open: {sign}"
    return ForeignWal(database, problem, "wal_replaced")


def is_open(database: Path, real: str, *, elsewhere: bool = False) -> bool:
    """Whether anybody, or another process, has it open; True where the kernel does not say."""
    ask = fcntl.F_GETLK if elsewhere else None
    with contextlib.suppress(OSError):
        return not _CAN_ASK or _held_lock(database, real, _DATABASE_SHARED, ask) != fcntl.F_UNLCK
    return True


@contextlib.contextmanager
def held_open(database: Path, real: str) -> Iterator[None]:
    """Within the context, SQLite finds that others have the database open.

    The lock is of our descriptor, and those of SQLite are of the process: they exclude each other.
    """
    descriptor = None
    with contextlib.suppress(OSError):
        descriptor = descriptors.descriptor_of(database, real) if _CAN_ASK else None
    _lock(descriptor, fcntl.F_RDLCK)
    try:
        yield
    finally:
        _lock(descriptor, fcntl.F_UNLCK)


def _lock(descriptor: int | None, kind: int) -> None:
    if descriptor is not None:
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(kind, _DATABASE_SHARED))


def _require_own_files(database: Path, real: str, found: Wal) -> None:
    """Raise ForeignWal if whoever has the database open has other files. No `-wal` has frames here.

    Others have it open with another `-wal`: two of them damage it. Or a file was copied over it:
    SQLite goes by the length that is in the `-shm`. A checkpoint then cuts the file to it, or fails
    because the file is too short, and succeeds once it has grown.
    """
    if _held_lock(database, f"{real}-shm", _SHM_ALIVE) == fcntl.F_UNLCK:
        if is_wal_database(database):
            _require_none_elsewhere(database, real)
        return
    if found is Wal.ABSENT:  # it was removed: SQLite opens it before the -shm, and removes it after
        raise _elsewhere(database)
    index, length = _index(database, real), os.stat(real).st_size
    found = _size_of_wal(real)
    if index is None or index != _index(database, real):  # somebody writes
        return
    _, _, is_initialized, page_size, frames, pages, *_ = index
    if frames and found is not Wal.IN_USE:  # emptied, or removed
        raise _elsewhere(database)
    if is_initialized and pages and not frames and length != pages * (page_size & ~1 or 65536):
        raise _copied_over(database, "its -shm has another length")


def checkpointed(database: Path, real: str) -> tuple[int, int]:
    """Return how many frames of the `-wal` were moved, and how many were to be; else zeros."""
    with contextlib.suppress(OSError):
        if index := _index(database, real):
            return index[6:]
    return 0, 0


def _index(database: Path, real: str) -> tuple[int, int, bool, int, int, int, int, int] | None:
    """Return the start of the `-shm`; None if there is none."""
    descriptor = descriptors.descriptor_of(database, f"{real}-shm")
    start = b"" if descriptor is None else os.pread(descriptor, struct.calcsize(_INDEX), 0)
    return struct.unpack(_INDEX, start) if len(start) == struct.calcsize(_INDEX) else None


def is_wal_database(database: Path) -> bool:
    """Whether its header says that it is in WAL mode (sqlite.org/fileformat2.html, 1.3)."""
    descriptor = descriptors.descriptor_of(database, os.path.realpath(database))
    header = os.pread(descriptor, 20, 0) if descriptor is not None else b""
    return header.startswith(b"SQLite format 3\0") and header[18:20] == b"\2\2"


def _held_lock(database: Path, path: str, span: tuple[int, int], ask: int | None = None) -> int:
    """Return what kind of lock anybody (`F_GETLK`: another process) holds there, or `F_UNLCK`."""
    if (descriptor := descriptors.descriptor_of(database, path)) is None:
        return fcntl.F_UNLCK
    answer = fcntl.fcntl(descriptor, ask or fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, span))
    return int(struct.unpack(_FLOCK, answer)[0])


def _flock(kind: int, span: tuple[int, int]) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, *span, 0)
