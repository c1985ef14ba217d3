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
import glob
import os
import struct
import threading
import time
from typing import TYPE_CHECKING, Final

from mbcap_watch.errors import DatabaseBusy, DatabaseError, DatabaseFailed, ForeignWal
from mbcap_watch.limits import close_reader
from mbcap_watch.store.errors import cause_of

if TYPE_CHECKING:
    from pathlib import Path

_SHM_ALIVE: Final = (128, 1)
_DATABASE_SHARED: Final = (1073741826, 510)
# Only Linux answers without harm. Elsewhere a -wal is taken to be the database's own.
_CAN_ASK: Final = hasattr(fcntl, "F_OFD_GETLK")
# One file is asked about after the other, and others open and close them meanwhile. So what stands
# in the way is believed when it still does so after each of these pauses.
_PAUSES: Final = (0.01, 0.05, 0.1)
_FLOCK: Final = "hhqqi4x"  # struct flock: type, whence, start, length, pid (fcntl(2))
# The start of the -shm: version, changes, initialized, page size, frames in the -wal, pages of the
# database (https://www.sqlite.org/walformat.html, 2.1).
_INDEX: Final = "=I4xI?xHII"


class Wal(enum.Enum):
    """What lies beside the database."""

    ABSENT = enum.auto()
    EMPTY = enum.auto()
    IN_USE = enum.auto()
    LEFT_BEHIND = enum.auto()


_opening: Final[dict[str, threading.Lock]] = {}


def opening_lock(database: Path) -> threading.Lock:
    """Return the lock that is held from `require_own_wal` until the connection's first read.

    Each database has its own: one on a disk that does not answer holds up no other.
    """
    return _opening.setdefault(os.path.realpath(database), threading.Lock())


def require_own_wal(database: Path, grace: float) -> Wal:
    """Return what lies beside the database, if it may be opened in any mode.

    Hold `opening_lock(database)` meanwhile, and until the first read of the connection.

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
            return Wal.IN_USE if os.stat(f"{real}-wal").st_size else Wal.EMPTY
        _release(database, replaced=True)
        if _has_removed_shm(real):
            problem = "it is open here with a -shm that was removed; restart this process"
            raise ForeignWal(database, problem, "wal_replaced")
        if not os.stat(f"{real}-wal").st_size:
            _require_own_length(database, real)
            return Wal.EMPTY
        return _judge(database, real, grace)
    except FileNotFoundError:  # or no longer: somebody closes the last connection just now
        return Wal.ABSENT
    except OSError as exc:
        problem = f"the kernel does not say whose its -wal is: {exc.strerror}"
        raise DatabaseFailed(database, problem, cause_of(exc)) from exc


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
        if abs(age) < grace:  # if the clock was set back, an old time lies in the future
            problem = "its -wal was left behind by a process that has ended"
            raise ForeignWal(database, problem, "wal_left_behind")
        return Wal.LEFT_BEHIND
    if opened == fcntl.F_UNLCK:
        problem = "its -wal belongs to another file, which was replaced and is still open"
        raise ForeignWal(database, problem, "wal_replaced")
    return Wal.IN_USE


def is_open_elsewhere(database: Path, real: str) -> bool:
    """Whether another process has the database open; True where the kernel does not say."""
    kind = _held_lock(database, real, _DATABASE_SHARED, fcntl.F_GETLK) if _CAN_ASK else None
    return kind != fcntl.F_UNLCK


def _require_own_length(database: Path, real: str) -> None:
    """Raise ForeignWal if a file was copied over the database while somebody has it open.

    SQLite goes by the length that is in the `-shm`. A checkpoint then cuts the file to it, or fails
    because the file is too short, and succeeds once it has grown. Ask only beside an empty `-wal`.
    """
    try:
        if _held_lock(database, f"{real}-shm", _SHM_ALIVE) == fcntl.F_UNLCK:
            return
        index, length = _index(database, real), os.stat(real).st_size
        if index is None or index != _index(database, real):  # somebody writes
            return
    except PermissionError:  # SQLite may not open it either, and says so
        return
    _, _, is_initialized, page_size, frames, pages = index
    if is_initialized and pages and not frames and length != pages * (page_size & ~1 or 65536):
        problem = "another file was copied over it while it is open: its -shm has another length"
        raise ForeignWal(database, problem, "wal_replaced")


def _index(database: Path, real: str) -> tuple[int, int, bool, int, int, int] | None:
    """Return the start of the `-shm`; None if there is none."""
    descriptor = _descriptor(database, f"{real}-shm")
    start = b"" if descriptor is None else os.pread(descriptor, struct.calcsize(_INDEX), 0)
    return struct.unpack(_INDEX, start) if len(start) == struct.calcsize(_INDEX) else None


def is_wal_database(database: Path) -> bool:
    """Whether its header says that it is in WAL mode (sqlite.org/fileformat2.html, 1.3)."""
    descriptor = _descriptor(database, os.path.realpath(database))
    header = os.pread(descriptor, 20, 0) if descriptor is not None else b""
    return header.startswith(b"SQLite format 3\0") and header[18:20] == b"\2\2"


def identity_of(file: str | int) -> tuple[int, int] | None:
    """Return which file is at a path or descriptor, as device and inode; None if there is none."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _held_lock(database: Path, path: str, span: tuple[int, int], ask: int | None = None) -> int:
    """Return what kind of lock anybody (`F_GETLK`: another process) holds there, or `F_UNLCK`."""
    if (descriptor := _descriptor(database, path)) is None:
        return fcntl.F_UNLCK
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *span, 0)
    answer = fcntl.fcntl(descriptor, ask or fcntl.F_OFD_GETLK, asked)
    return int(struct.unpack(_FLOCK, answer)[0])


# Descriptors to ask with, by file; each with its path, and that of the database, perhaps a link.
_kept: Final[dict[tuple[int, int], tuple[int, set[str]]]] = {}


def _descriptor(database: Path, path: str) -> int | None:
    """Return a descriptor of a file of the database, to ask with; None if there is no file.

    Closing a descriptor drops every lock that the process holds on its file (fcntl(2), "record
    locks"), also one that a host's connection has got a moment ago. And what a connection has
    opened it may close at any moment. So the descriptor is one of our own, and is kept until
    `release`.
    """
    try:
        status = os.stat(path)
        if (identity := (status.st_dev, status.st_ino)) in _kept:
            return _kept[identity][0]
        # O_NONBLOCK: a FIFO may stand there.
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        return None
    _kept[identity_of(opened) or identity] = opened, {path, str(database)}
    return opened


def _forget() -> None:
    """Begin anew in a forked child, which may close all descriptors, and use their numbers anew."""
    for identity, (descriptor, _) in _kept.items():
        if identity_of(descriptor) == identity:
            close_reader(descriptor)
    _kept.clear()
    _opening.clear()  # a lock that was held then would be so for ever


os.register_at_fork(after_in_child=_forget)


def release(database: Path) -> None:
    """Close the descriptors that were kept to ask with; for the end of a bridge."""
    with opening_lock(database):
        _release(database)


def _release(database: Path, *, replaced: bool = False) -> None:
    """Close the descriptors of the database's files, or only of those that it no longer has.

    They were replaced, or its path is a link that leads elsewhere now. Where a connection of this
    process has the file open, its descriptor stays.
    """
    paths = [os.path.realpath(database) + side for side in ("", "-shm")]
    present = set(map(identity_of, paths)) if replaced else set()
    for identity, (descriptor, names) in list(_kept.items()):
        if names.isdisjoint((*paths, str(database))):
            continue
        found = identity_of(descriptor)
        if found is None and os.path.lexists(f"/proc/self/fd/{descriptor}"):
            continue  # the kernel does not say, now, which file it is
        still_ours = found == identity  # a host may have closed all that it does not know
        if still_ours and (identity in present or _is_open_here(f"/proc/self/fd/{descriptor}")):
            continue
        # Two paths may lead to one file: whoever takes it from there closes it.
        if _kept.pop(identity, None) and still_ours:
            close_reader(descriptor)


def _has_removed_shm(real: str) -> bool:
    """Whether a connection of this process has a `-shm` open that was removed.

    SQLite would share it with ours. Everybody else locks the new one: writes could be lost.
    """
    ours = {f"/proc/self/fd/{descriptor}" for descriptor, _ in _kept.values()}
    for link in set(glob.iglob("/proc/self/fd/*")) - ours:
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(link) == f"{real}-shm (deleted)":
                return _is_open_here(real) and not _is_open_here(f"{real}-shm")
    return False


def _is_open_here(path: str) -> bool:
    """Whether this process has the file open, apart from `_kept`; True if that cannot be told.

    One of its descriptors may be on a mount whose server does not answer: to `stat` that would
    wait for ever. So it is asked only about what can be the same file by what the kernel knows
    itself: the filesystem, by whatever mount, and the inode (proc(5), `fdinfo` and `mountinfo`).
    """
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)  # to close it drops no lock
    except FileNotFoundError:
        return not os.path.exists("/proc/self/fd")
    except OSError:  # no descriptor is left to ask with, say
        return True
    own = {place, *(descriptor for descriptor, _ in _kept.values())}
    try:
        (mount, inode), identity = _fdinfo(place), identity_of(place)
        for descriptor in {*map(int, os.listdir("/proc/self/fd"))} - own:
            with contextlib.suppress(OSError):  # closed meanwhile
                its_mount, its_inode = _fdinfo(descriptor)
                may_be = its_inode == inode and _may_be_one_filesystem(its_mount, mount)
                if may_be and identity_of(descriptor) == identity:
                    return True
    except OSError:
        return True
    finally:
        close_reader(place)
    return False


def _fdinfo(descriptor: int) -> tuple[bytes, bytes | None]:
    """Return the mount and the inode of a descriptor; before Linux 5.14 no inode."""
    with open(f"/proc/self/fdinfo/{descriptor}", "rb", buffering=0) as file:
        words = file.read(200).split()  # pos: 0 flags: 02 mnt_id: 24 ino: 3
    return words[5], words[7] if words[6:7] == [b"ino:"] else None


def _may_be_one_filesystem(mount: bytes, other: bytes) -> bool:
    if mount == other:
        return True
    with open("/proc/self/mountinfo", "rb") as lines:
        devices = {words[0]: words[2] for words in map(bytes.split, lines)}
    known = devices.get(mount), devices.get(other)
    return None in known or known[0] == known[1]
