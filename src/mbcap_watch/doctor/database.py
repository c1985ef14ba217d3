"""`check`, the database from outside: where it is, who may write it, and on what it lies."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shlex
import stat
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from mbcap_watch.cli.config import DATABASE_VARIABLE
from mbcap_watch.doctor.findings import Finding, ok, problem, size, warning
from mbcap_watch.watcher.mounts import INOTIFY_FILESYSTEMS, Mount, mount_of, mount_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

SIDES: Final = ("-wal", "-shm", "-journal")

_SPACE_NEEDED: Final = 16 << 20
_SPACE_SCARCE: Final = 256 << 20
_SCARCE_SHARE: Final = 0.05

_LOCAL: Final = INOTIFY_FILESYSTEMS | {"bcachefs", "exfat", "fuseblk", "jfs", "ntfs3", "vfat"}
_REMOTE: Final = {"9p", "afs", "ceph", "cifs", "lustre", "virtiofs", "vboxsf"}

# A directory may hold a million files; hints need not know them all.
_LISTED: Final = 1_000
_HINTS: Final = 5


class Place(NamedTuple):
    """A path: what is there, or why that cannot be told, and what this process may do to it."""

    path: Path
    status: os.stat_result | None = None
    error: OSError | None = None
    readable: bool = False
    writable: bool = False
    searchable: bool = False

    @property
    def regular(self) -> bool:
        """Whether a regular file is there."""
        return self.status is not None and stat.S_ISREG(self.status.st_mode)

    @property
    def directory(self) -> bool:
        """Whether a directory is there."""
        return self.status is not None and stat.S_ISDIR(self.status.st_mode)

    @property
    def shown(self) -> str:
        """The path and whose it is, for people."""
        if self.status is None:
            return str(self.path)
        mode = stat.S_IMODE(self.status.st_mode)
        return f"{self.path} (user {self.status.st_uid}, mode {mode:04o})"


def place(path: Path) -> Place:
    """Look at a path without opening it; links are followed."""
    try:
        status = os.stat(path)
    except OSError as exc:
        return Place(path, error=exc)
    may = partial(os.access, path, effective_ids=True)
    return Place(path, status, None, may(os.R_OK), may(os.W_OK), may(os.X_OK))


def closed_way(subject: str, path: Path) -> Finding | None:
    """Return a problem if a directory on the way to `path` may not be entered."""
    for each in map(place, reversed(path.parents)):
        if each.directory and not each.searchable:
            text = f"{path} cannot be reached: user {os.geteuid()} may not enter {each.shown}"
            remedy = f"run as a user who may, or as root: chmod o+x {shlex.quote(str(each.path))}"
            return problem(subject, text, remedy)
    return None


def examine(database: Path, environ: Mapping[str, str]) -> list[Finding]:
    """Examine the file, its directory and its filesystem. Blocks."""
    return list(_examine(database, environ))


def _examine(database: Path, environ: Mapping[str, str]) -> Iterator[Finding]:
    file, real = place(database), Path(os.path.realpath(database))
    if not file.regular or not file.status:
        yield closed_way("database", database) or _no_file(file, real, environ)
        return
    where = str(database) if database == real else f"{database}, which is {real}"
    if file.status.st_size:
        yield ok("database", f"{where}, {size(file.status.st_size)}")
    else:
        remedy = "something created it by mistake: set the path of CoreScope's database, or start"
        yield problem("database", f"{where} is empty", f"{remedy} CoreScope's ingestor")
    directory, space = place(real.parent), os.statvfs(real.parent)
    sides = [side for side in (place(Path(f"{real}{s}")) for s in SIDES) if side.status]
    if space.f_flag & os.ST_RDONLY:
        remedy = f"mount it read-write (no :ro on a volume; ReadWritePaths={real.parent} in the"
        remedy += " unit); after a disk error (dmesg), repair the disk first"
        yield problem("permissions", f"{real.parent} is on a read-only filesystem", remedy)
    else:
        yield _judge_permissions(file, directory, sides, file.status.st_uid)
        yield from judge_owner(file.status, directory, sides, os.geteuid(), os.getegid())
    if any(Path(mount.mount_point) == real for mount in mount_table()):
        text = f"{real} is mounted as a single file: its -wal and -shm are not shared with"
        remedy = "mount the directory that holds the database instead, in every container"
        yield problem("filesystem", f"{text} CoreScope, which corrupts it", remedy)
    yield judge_filesystem(mount_of(real.parent))
    yield judge_space(real.parent, space)


# ------------------------------------------------------------------------------ no such file


def _no_file(file: Place, real: Path, environ: Mapping[str, str]) -> Finding:
    """Say what is at the database's path instead of a file, and where it may be."""
    path, error = file.path, file.error
    if file.directory:
        remedy = "set the path of the file in it. Docker makes a directory where the source of a"
        remedy += f" bind mount is missing: then rmdir {shlex.quote(str(path))}, and mount"
        return problem("database", f"{path} is a directory", f"{remedy} CoreScope's data directory")
    if error is None:
        return problem("database", f"{path} is no regular file", "set the database's path")
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        remedy = "repair the path, or the filesystem that it is on"
        return problem("database", f"{path} cannot be reached: {error.strerror}", remedy)
    text = f"{path} does not exist"
    if path != real:
        text += f" (a link on the way leads to {real})"
    if not listing(real.parent):
        text += f", and {real.parent} is missing or empty: is a volume not mounted?"
    remedy = "set database (--database, MBCAP_WATCH_DATABASE, DB_PATH) to CoreScope's file; "
    hints = "; ".join(_hints(path, environ)) or "or start its ingestor, which creates it"
    return problem("database", text, remedy + hints)


def nearby(path: Path) -> list[Path]:
    """Return the directories in which somebody who mistook `path` may have meant a file."""
    around = [path.parent, path.parent.parent, Path("/app")]  # the last is CoreScope's container's
    with contextlib.suppress(OSError):  # the working directory may be gone
        around.append(Path.cwd())
    return list(dict.fromkeys(each for parent in around for each in (parent, parent / "data")))


def listing(directory: Path) -> list[str]:
    """Return some names in a directory; none if it cannot be listed."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        return [entry.name for entry in itertools.islice(entries, _LISTED)]
    return []


def _hints(database: Path, environ: Mapping[str, str]) -> Iterator[str]:
    """Say where else the database may be: as CoreScope is told, and what lies near by."""
    if (told := environ.get(DATABASE_VARIABLE)) and Path(os.path.abspath(told)) != database:
        yield f"{DATABASE_VARIABLE} says {told}"
    paths = (directory / name for directory in nearby(database) for name in listing(directory))
    found = [path for path in paths if path.suffix in (".db", ".sqlite") and path.is_file()]
    yield from (f"there is {path}" for path in found[:_HINTS])


# ------------------------------------------------------------------------------ permissions


def _judge_permissions(
    file: Place, directory: Place, sides: Iterable[Place], owner: int
) -> Finding:
    uid = os.geteuid()
    shut = [each for each in (file, *sides) if not (each.readable and each.writable)]
    refused = [f"may not {'write' if each.readable else 'read'} {each.shown}" for each in shut]
    if not (directory.writable and directory.searchable):
        shut.append(directory)
        refused.append(f"may not create -wal and -shm in {directory.shown}")
    if not refused:
        return ok("permissions", f"user {uid} may write the database and its directory")
    if uid == 0:
        remedy = "root is refused by more than the mode: lsattr -d"
        remedy += f" {' '.join(shlex.quote(str(each.path)) for each in shut)} (chattr -i), the"
        remedy += " capabilities of the unit or container, or a security module (dmesg)"
    elif uid == owner:
        remedy = f"as root: {'; '.join(_give(each, uid) for each in shut)}"
    else:
        remedy = f"run mbcap-watch as the database's owner, user {owner} (User= in the unit, user:"
        remedy += " in compose), or give this user the rights by a common group"
    return problem("permissions", f"user {uid} {'; '.join(refused)}", remedy)


def _give(each: Place, uid: int) -> str:
    """Return the command that gives a user the rights to what is there."""
    path = shlex.quote(str(each.path))
    if each.status and each.status.st_uid != uid:
        return f"chown {uid} {path}"
    return f"chmod u+rw{'x' if each.directory else ''} {path}"


def judge_owner(
    status: os.stat_result, directory: Place, sides: Iterable[Place], uid: int, gid: int
) -> Iterator[Finding]:
    """Whether the files that SQLite creates beside the database lock its owner out, or would.

    They get the database's mode, and from root also its owner (`findCreateFileMode` and
    `robustFchown` in SQLite's os_unix.c).
    """
    owner, mode = status.st_uid, status.st_mode
    for side in sides:
        if side.status and owner and not _may_write(side.status, owner, status.st_gid):
            text = f"{side.shown} cannot be written by the database's owner, user {owner}:"
            remedy = f"as root: chown {owner}:{status.st_gid} {shlex.quote(str(side.path))} (never"
            remedy += f" delete it); run mbcap-watch as user {owner}"
            yield problem("owner", f"{text} CoreScope's ingestor is locked out", remedy)
    if directory.status and directory.status.st_mode & stat.S_ISGID:
        gid = directory.status.st_gid
    shared = mode & stat.S_IWOTH or (mode & stat.S_IWGRP and gid == status.st_gid)
    if uid not in (0, owner) and not shared:
        text = f"the database belongs to user {owner}, this is user {uid}: -wal and -shm files"
        text += f" that SQLite creates for user {uid} lock out CoreScope's ingestor"
        remedy = f"run mbcap-watch as user {owner} (User= in the unit, user: in compose)"
        yield warning("owner", text, remedy)


def _may_write(status: os.stat_result, uid: int, gid: int) -> bool:
    shift = 6 if status.st_uid == uid else 3 if status.st_gid == gid else 0
    return bool(status.st_mode >> shift & stat.S_IWOTH)


# ------------------------------------------------------------------------------ filesystem


def is_remote(mount: Mount) -> bool:
    """Whether a mount is a network filesystem."""
    network = ("nfs", "smb", "fuse.sshfs", "fuse.rclone", "fuse.gluster")
    return mount.type in _REMOTE or mount.type.startswith(network)


def judge_filesystem(mount: Mount) -> Finding:
    """Whether SQLite's locks and shared memory work there (sqlite.org/wal.html, "Overview", 6)."""
    where = f"the database is on {mount.type} ({mount.mount_point})"
    if is_remote(mount):
        remedy = "move the database to a local disk of the machine that runs CoreScope and"
        remedy += " mbcap-watch; only the snapshot may be on a network (snapshot_dir)"
        text = f"{where}: SQLite's WAL does not work on a network filesystem"
        return problem("filesystem", text, remedy)
    if mount.type == "overlay" and mount.mount_point == "/":
        text = f"{where}: it is part of the container, and gone with it"
        return warning("filesystem", text, "mount CoreScope's data directory there, as a volume")
    if mount.type not in _LOCAL:
        text = f"{where}: whether SQLite's locks work there is not known"
        return warning("filesystem", text, "use a local filesystem such as ext4, xfs or btrfs")
    return ok("filesystem", where)


def judge_space(directory: Path, space: os.statvfs_result) -> Finding:
    """Whether the disk has room (statvfs(3)); some filesystems do not say."""
    free = space.f_bavail * space.f_frsize
    share = space.f_bavail / space.f_blocks if space.f_blocks else 1.0
    remedy = f"make room (df -h {shlex.quote(str(directory))}); what waits is written then"
    if space.f_blocks and free < _SPACE_NEEDED:
        return problem("disk space", f"the disk is full: {size(free)} free", remedy)
    if space.f_files and not space.f_favail:
        remedy = (
            f"remove small files (df -i {shlex.quote(str(directory))}); what waits is written then"
        )
        return problem("disk space", f"no inode is left, though {size(free)} are free", remedy)
    if free < _SPACE_SCARCE and share < _SCARCE_SHARE:
        return warning("disk space", f"only {size(free)} ({share:.0%}) free", remedy)
    return ok("disk space", f"{size(free)} free")
