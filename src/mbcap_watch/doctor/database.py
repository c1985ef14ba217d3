"""`check`, the database from outside: where it is, who may write it, and its filesystem."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mbcap_watch.doctor.findings import Finding, Installation, ok, quote, size
from mbcap_watch.doctor.places import (
    Place,
    beyond_mode,
    blocked_way,
    listing,
    mode_of,
    nearby,
    place,
)
from mbcap_watch.settings import DATABASE_VARIABLE
from mbcap_watch.store.errors import SIDES
from mbcap_watch.watcher.mounts import INOTIFY_FILESYSTEMS, UNKNOWN, Mount, mount_of, mount_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_SPACE_NEEDED: Final = 16 << 20
_SPACE_SCARCE: Final = 256 << 20
_SCARCE_SHARE: Final = 0.05

_LOCAL: Final = INOTIFY_FILESYSTEMS | {"bcachefs", "exfat", "fuseblk", "jfs", "ntfs3", "vfat"}
_REMOTE: Final = {"9p", "afs", "ceph", "cifs", "lustre", "virtiofs", "vboxsf"}
_REMOTE_KINDS: Final = ("nfs", "smb", "fuse.sshfs", "fuse.rclone", "fuse.gluster")

_HINTS: Final = 5


def examine(installation: Installation, environ: Mapping[str, str]) -> list[Finding]:
    """Examine the file, its directory and its filesystem. Blocks."""
    return list(_examine(installation, environ))


def _examine(installation: Installation, environ: Mapping[str, str]) -> Iterator[Finding]:
    database = Path(installation.database)
    file, real = place(database), Path(os.path.realpath(database))
    blocked = blocked_way(installation, "not_permitted", "database", database)
    if blocked or not file.regular or not file.status:
        yield blocked or _no_file(installation, file, real, environ)
        return
    where = str(database) if database == real else f"{database}, which is {real}"
    if file.status.st_size:
        yield ok("database", f"{where}, {size(file.status.st_size)}")
    else:
        yield installation.finding("empty_database", where=where)
    # What SQLite does, it does where a link leads.
    there = installation._replace(database=str(real))
    directory, space = place(real.parent), os.statvfs(real.parent)
    sides = [side for side in (place(Path(f"{real}{s}")) for s in SIDES) if side.status]
    if space.f_flag & os.ST_RDONLY:
        yield there.finding("read_only")
    else:
        yield _judge_permissions(there, file, directory, sides)
        yield from judge_owner(there, file.status, directory, sides, os.geteuid(), os.getegid())
    if any(Path(mount.mount_point) == real for mount in mount_table()):
        yield there.finding("single_file", path=real)
    yield from judge_filesystem(there, mount_of(real.parent))
    yield judge_space(there, space)


# ------------------------------------------------------------------------------ no such file


def _no_file(
    installation: Installation, file: Place, real: Path, environ: Mapping[str, str]
) -> Finding:
    """Say what is at the database's path instead of a file, and where it may be."""
    path, error = file.path, file.error
    if error is None:
        kind = "is a directory" if file.directory else "is no regular file"
        return installation.finding("not_a_file", f"{path} {kind}")
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        text = f"{path} cannot be reached: {error.strerror}"
        remedy = "repair the path, or the filesystem that it is on"
        return installation.finding("disk_error", text, remedy=remedy)
    text = f"{path} does not exist"
    if path != real:
        text += f" (a link on the way leads to {real})"
    if not listing(real.parent):
        text += f", and {real.parent} is missing or empty: is a volume not mounted?"
    remedy = "set database (--database, MBCAP_WATCH_DATABASE, DB_PATH) to CoreScope's file; "
    hints = "; ".join(_hints(path, environ)) or "or start its ingestor, which creates it"
    return installation.finding("database_missing", text, remedy=remedy + hints)


def _hints(database: Path, environ: Mapping[str, str]) -> Iterator[str]:
    """Say where else the database may be: as CoreScope's variable says, and what lies near by."""
    if (named := environ.get(DATABASE_VARIABLE)) and Path(os.path.abspath(named)) != database:
        yield f"{DATABASE_VARIABLE} says {named}"
    paths = (directory / name for directory in nearby(database) for name in listing(directory))
    found = [path for path in paths if path.suffix in (".db", ".sqlite") and path.is_file()]
    yield from (f"there is {path}" for path in found[:_HINTS])


# ------------------------------------------------------------------------------ permissions


def _judge_permissions(
    installation: Installation, file: Place, directory: Place, sides: Iterable[Place]
) -> Finding:
    uid, owner = os.geteuid(), file.status.st_uid if file.status else 0
    shut = [each for each in (file, *sides) if not (each.readable and each.writable)]
    refused = [f"may not {'write' if each.readable else 'read'} {each.shown}" for each in shut]
    if not (directory.writable and directory.searchable):
        shut.append(directory)
        refused.append(f"may not create -wal and -shm in {directory.shown}")
    if not refused:
        return ok("permissions", f"user {uid} may write the database and its directory")
    remedy = beyond_mode(shut, os.R_OK | os.W_OK)
    if not remedy and uid == owner:
        remedy = f"as root: {'; '.join(_give(each, uid) for each in shut)}"
    elif not remedy:
        remedy = f"run mbcap-watch as the database's owner, user {owner} (User= in the unit, user:"
        remedy += " in compose), or give this user the rights by a common group"
    text = f"user {uid} {'; '.join(refused)}"
    return installation.finding("not_permitted", text, remedy=remedy)


def _give(each: Place, uid: int) -> str:
    """Return the command that gives a user the rights to a place."""
    if each.status and each.status.st_uid != uid:
        return f"chown {uid} {quote(each.path)}"
    return f"chmod u+rw{'x' if each.directory else ''} {quote(each.path)}"


def judge_owner(
    installation: Installation,
    status: os.stat_result,
    directory: Place,
    sides: Iterable[Place],
    uid: int,
    gid: int,
) -> Iterator[Finding]:
    """Judge whether the files that SQLite creates beside the database lock its owner out.

    They get the database's mode, and from root also its owner (`findCreateFileMode` and
    `robustFchown` in SQLite's os_unix.c).
    """
    owner, group, mode = status.st_uid, status.st_gid, status.st_mode
    out = [
        s for s in sides if s.status and owner and not mode_of(s.status, owner, [group]) & os.W_OK
    ]
    if out:
        paths, files = ", ".join(s.shown for s in out), " ".join(quote(s.path) for s in out)
        yield installation.finding("locked_out", path=paths, file=files, owner=owner, group=group)
    if directory.status and directory.status.st_mode & stat.S_ISGID:
        gid = directory.status.st_gid
    shared = mode & stat.S_IWOTH or (mode & stat.S_IWGRP and gid == group)
    if uid not in (0, owner) and not shared:
        yield installation.finding("foreign_owner", owner=owner, uid=uid)


# ------------------------------------------------------------------------------ filesystem


def is_remote(mount: Mount) -> bool:
    """Whether a mount is a network filesystem."""
    return mount.type in _REMOTE or mount.type.startswith(_REMOTE_KINDS)


def judge_filesystem(installation: Installation, mount: Mount) -> Iterator[Finding]:
    """Judge whether SQLite's locks and shared memory work (sqlite.org/wal.html, "Overview", 6)."""
    where = f"the database is on {mount.type} ({mount.mount_point})"
    if is_remote(mount):
        yield installation.finding("network_filesystem", where=where)
    elif mount.type == "overlay" and mount.mount_point == "/":
        yield installation.finding("in_container", where=where)
    elif mount.type in _LOCAL:
        yield ok("filesystem", where)
    elif mount != UNKNOWN:  # else `no_proc` says why
        yield installation.finding("unknown_filesystem", where=where)


def judge_space(
    installation: Installation, space: os.statvfs_result, subject: str = "disk space"
) -> Finding:
    """Judge whether a disk has room (statvfs(3)); some filesystems do not say."""
    free = space.f_bavail * space.f_frsize
    share = space.f_bavail / space.f_blocks if space.f_blocks else 1.0
    if space.f_blocks and free < _SPACE_NEEDED:
        text = f"the disk is full: {size(free)} free"
        return installation.finding("disk_full", text, subject=subject)
    if space.f_files and not space.f_favail:
        text = f"the disk is full: no inode is left, though {size(free)} are free"
        return installation.finding("disk_full", text, subject=subject)
    if free < _SPACE_SCARCE and share < _SCARCE_SHARE:
        about = {"free": size(free), "share": f"{share:.0%}"}
        return installation.finding("disk_scarce", subject=subject, **about)
    return ok(subject, f"{size(free)} free")
