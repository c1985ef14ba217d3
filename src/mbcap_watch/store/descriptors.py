"""The descriptors through which locks are asked about, and what this process has open besides.

Closing any descriptor of a file drops every lock that the process holds on it (fcntl(2), "record
locks"). So those that are opened to ask with are kept, until nothing here has the file open.
"""

from __future__ import annotations

import contextlib
import glob
import os
import threading
from typing import TYPE_CHECKING, Final

from mbcap_watch.limits import close_reader

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_opening: Final[dict[str, threading.Lock]] = {}


def opening_lock(database: Path) -> threading.Lock:
    """Return the lock that is held from `require_own_wal` until the connection's first read.

    Each database has its own: one on a disk that does not answer holds up no other.
    """
    return _opening.setdefault(os.path.realpath(database), threading.Lock())


def identity_of(file: str | Path | int) -> tuple[int, int] | None:
    """Return which file is at a path or descriptor, as device and inode; None if there is none."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino


# Descriptors to ask with, by file; each with its path, and that of the database, perhaps a link.
kept: Final[dict[tuple[int, int], tuple[int, set[str]]]] = {}


def descriptor_of(database: Path, path: str) -> int | None:
    """Return a descriptor of a file of the database, to ask with; None if there is no file.

    A host's connection may get a lock on the file at any moment, and close what it has opened. So
    the descriptor is one of our own, and is kept until `release`.
    """
    try:
        status = os.stat(path)
        if (identity := (status.st_dev, status.st_ino)) in kept:
            return kept[identity][0]
        # O_NONBLOCK: a FIFO may stand there.
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        return None
    kept[identity_of(opened) or identity] = opened, {path, str(database)}
    return opened


def _forget() -> None:
    """Begin anew in a forked child, which may close all descriptors, and use their numbers anew."""
    for identity, (descriptor, _) in kept.items():
        if identity_of(descriptor) == identity:
            close_reader(descriptor)
    kept.clear()
    _opening.clear()  # a lock that was held then would be so for ever


os.register_at_fork(after_in_child=_forget)


def release(database: Path) -> None:
    """Close the descriptors that were kept to ask with; for the end of a bridge."""
    with opening_lock(database):
        _release(database)


def release_replaced(database: Path) -> None:
    """Close those of files that the database no longer has: its path, or a link, leads elsewhere.

    Hold `opening_lock(database)`.
    """
    _release(database, set(map(identity_of, _files(database))))


def _files(database: Path) -> list[str]:
    return [os.path.realpath(database) + side for side in ("", "-shm")]


def _release(database: Path, present: Collection[tuple[int, int] | None] = ()) -> None:
    """Close all but those of `present`, and of what a connection of this process has open."""
    paths = _files(database)
    for identity, (descriptor, names) in list(kept.items()):
        if names.isdisjoint((*paths, str(database))):
            continue
        found = identity_of(descriptor)
        if found is None and os.path.lexists(f"/proc/self/fd/{descriptor}"):
            continue  # the kernel does not say, now, which file it is
        still_ours = found == identity  # a host may have closed all that it does not know
        if still_ours and (identity in present or _is_open_here(f"/proc/self/fd/{descriptor}")):
            continue
        # Two paths may lead to one file: whoever takes it from there closes it.
        if kept.pop(identity, None) and still_ours:
            close_reader(descriptor)


def _own() -> set[int]:
    """Return the descriptors of `kept`, to which other threads may add meanwhile."""
    return {descriptor for descriptor, _ in kept.copy().values()}


def has_removed_shm(real: str) -> bool:
    """Whether a connection of this process has a `-shm` open that was removed.

    SQLite would share it with ours. Everybody else locks the new one: writes could be lost.
    """
    ours = {f"/proc/self/fd/{descriptor}" for descriptor in _own()}
    for link in set(glob.iglob("/proc/self/fd/*")) - ours:
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(link) == f"{real}-shm (deleted)":
                return _is_open_here(real) and not _is_open_here(f"{real}-shm")
    return False


def _is_open_here(path: str) -> bool:
    """Whether this process has the file open, apart from `kept`; True if that cannot be told.

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
    own = {place, *_own()}
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
