"""Places: what is at a path, whether this user gets there and why not, and what disk it is on."""

from __future__ import annotations

import os
import stat
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from mbcap_watch.doctor.findings import Finding, Installation, ok, quote, size
from mbcap_watch.snapshot.files import SNAPSHOT_NAME
from mbcap_watch.watcher.mounts import INOTIFY_FILESYSTEMS, UNKNOWN, Mount, mount_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SPACE_NEEDED: Final = 16 << 20

_LOCAL: Final = INOTIFY_FILESYSTEMS | {"bcachefs", "exfat", "fuseblk", "jfs", "ntfs3", "vfat"}
_REMOTE: Final = ("9p", "afs", "ceph", "cifs", "lustre", "nfs", "smb", "vboxsf", "virtiofs")
_REMOTE_FUSE: Final = ("fuse.sshfs", "fuse.rclone", "fuse.gluster")


class Place(NamedTuple):
    """A path: what is there, or why that is not known, and what this process may do to it."""

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
        """The path, its owner and its mode, for people."""
        if self.status is None:
            return str(self.path)
        mode = stat.S_IMODE(self.status.st_mode)
        return f"{self.path} (user {self.status.st_uid}, mode {mode:04o})"


def place(path: Path) -> Place:
    """Return what is at a path, without opening it; links are followed."""
    try:
        status = os.stat(path)
    except OSError as exc:
        return Place(path, error=exc)
    may = partial(os.access, path, effective_ids=True)
    return Place(path, status, None, may(os.R_OK), may(os.W_OK), may(os.X_OK))


def blocked_way(here: Installation, code: str, subject: str, path: Path) -> Finding | None:
    """Return a problem if a directory on the way to `path` is closed (`code`) or was deleted."""
    for each in map(place, reversed(path.parents)):
        # A mount goes on showing a directory that was deleted where it was mounted from.
        if each.directory and each.status and not each.status.st_nlink:
            return here.finding("deleted_mount", subject=subject, path=each.path)
        if each.directory and not each.searchable:
            text = f"{path} cannot be reached: user {os.geteuid()} may not enter {each.shown}"
            remedy = f"run as a user who may, or as root: chmod o+x {quote(each.path)}"
            remedy = beyond_mode([each], os.X_OK) or remedy
            return here.finding(code, text, remedy=remedy, subject=subject)
    return None


def cut_off(here: Installation) -> list[Finding]:
    """Name what keeps new snapshots from arriving where this process looks. Blocks."""
    path = Path(here.snapshot_dir, SNAPSHOT_NAME)
    real = os.path.realpath(path)
    way = blocked_way(here, "snapshot_unreadable", "snapshot dir", path)
    found = [way] if way and way.code == "deleted_mount" else []
    if any(mount.mount_point == real for mount in mount_table()):
        found.append(here.finding("single_snapshot", path=path))
    return found


def beyond_mode(shut: Iterable[Place], wanted: int) -> str:
    """Return the remedy where not the mode refuses (`os.R_OK` and so on); empty if it does."""
    uid, groups = os.geteuid(), {os.getegid(), *os.getgroups()}
    names = " ".join(
        quote(each.path)
        for each in shut
        if each.status and (uid == 0 or mode_of(each.status, uid, groups) & wanted == wanted)
    )
    if not names:
        return ""
    return (
        f"the mode would allow it, so something else refuses: lsattr -d {names} (as root: chattr"
        f" -i), getfacl {names} (setfacl), the capabilities of the unit or container, or a security"
        " module (dmesg)"
    )


def mode_of(status: os.stat_result, uid: int, groups: Iterable[int]) -> int:
    """Return what the mode of a file allows a user, as `os.R_OK` and so on."""
    shift = 6 if status.st_uid == uid else 3 if status.st_gid in groups else 0
    return status.st_mode >> shift & stat.S_IRWXO


def is_remote(mount: Mount) -> bool:
    """Whether a mount is a network filesystem."""
    return mount.type.startswith((*_REMOTE, *_REMOTE_FUSE))


def judge_filesystem(here: Installation, mount: Mount) -> Iterator[Finding]:
    """Judge whether SQLite's locks and shared memory work (sqlite.org/wal.html, "Overview", 6)."""
    where = f"the database is on {mount.type} ({mount.mount_point})"
    if is_remote(mount):
        yield here.finding("network_filesystem", where=where)
    elif mount.type in _LOCAL:
        yield ok("filesystem", where)
    elif mount != UNKNOWN:  # else `no_proc` says why
        yield here.finding("unknown_filesystem", where=where)


def judge_space(
    here: Installation, space: os.statvfs_result, subject: str = "disk space"
) -> Finding:
    """Judge whether a disk has room (statvfs(3)); some filesystems do not say."""
    free = space.f_bavail * space.f_frsize
    if space.f_blocks and free < _SPACE_NEEDED:
        return here.finding("disk_full", f"the disk is full: {size(free)} free", subject=subject)
    if space.f_files and not space.f_favail:
        text = f"the disk is full: no inode is left, though {size(free)} are free"
        return here.finding("disk_full", text, subject=subject)
    return ok(subject, f"{size(free)} free")
