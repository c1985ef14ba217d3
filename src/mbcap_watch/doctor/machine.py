"""What the machine tells: what is at a path and who may, the disk, who has the database open."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import stat
import struct
import time
import tomllib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from mbcap_watch import settings
from mbcap_watch.doctor.findings import Finding, Installation, duration, ok, quote, size
from mbcap_watch.errors import printable
from mbcap_watch.snapshot.files import SNAPSHOT_NAME
from mbcap_watch.watcher.mounts import Mount, mount_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_SPACE_NEEDED: Final = 16 << 20

_REMOTE: Final = (
    *("9p", "afs", "ceph", "cifs", "lustre", "nfs", "smb", "vboxsf", "virtiofs"),
    *("fuse.sshfs", "fuse.rclone", "fuse.gluster"),
)

# For how long a lock is watched.
LOCK_SECONDS: Final = 2.0

# The bytes that stand for a lock: in -shm the writer's and the readers' (sqlite.org/
# walformat.html, "WAL Locks"); in the database PENDING, RESERVED and SHARED (SQLite's os.h).
_WAL_WRITER: Final = (120, 1)
WAL_READERS: Final = (123, 5)
_DATABASE_LOCKS: Final = (0x40000000, 512)
_FLOCK: Final = "hhqqi4x"  # struct flock: type, whence, start, length, pid


# ------------------------------------------------------------------------------ places


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
        f" -i), getfacl {names} (setfacl), the capabilities of the unit or container, a security"
        " module (dmesg), or on NFS the server's export (root_squash)"
    )


def mode_of(status: os.stat_result, uid: int, groups: Iterable[int]) -> int:
    """Return what the mode of a file allows a user, as `os.R_OK` and so on."""
    shift = 6 if status.st_uid == uid else 3 if status.st_gid in groups else 0
    return status.st_mode >> shift & stat.S_IRWXO


def is_remote(mount: Mount) -> bool:
    """Whether a mount is a network filesystem."""
    return mount.type.startswith(_REMOTE)


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


# ------------------------------------------------------------------------------ processes


def running() -> list[int]:
    """Return all other processes."""
    pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
    return sorted(pids - {os.getpid()})


def described(pid: int) -> str:
    """Return a process for people: its number, if it has one here, and what its command is."""
    if pid <= 0:
        return "a process in another container"
    try:
        return f"pid {pid} ({' '.join(_arguments_of(pid))[:80]})"
    except OSError:
        return f"pid {pid} (?)"


def _arguments_of(pid: int) -> list[str]:
    data = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [os.fsdecode(part) for part in data.rstrip(b"\0").split(b"\0")]


def is_paused(pid: int) -> bool:
    """Whether a process is stopped or traced."""
    return _stat_of(pid)[0] in ("T", "t")


def age_of(pid: int) -> float:
    """Return for how many seconds a process has run; 0 if it is gone."""
    with contextlib.suppress(IndexError):
        started = int(_stat_of(pid)[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    return 0.0


def _stat_of(pid: int) -> list[str]:
    """Return what /proc/PID/stat says from the state on (proc_pid_stat(5)); "X" if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ["X"]
    return text.rpartition(")")[2].split()


def leads_to(pid: int, its: str, ours: str) -> bool:
    """Whether a path of a process, which may be in a container, leads where ours does."""
    root, is_alike = f"/proc/{pid}/root", printable(its) == printable(ours)
    try:
        # The same path under the same root needs no lookup. Where a lookup by that process hangs,
        # ours through its root would hang as well, and could not be killed.
        if is_alike and os.path.samefile(root, "/"):
            return True
        return os.path.samefile(root + its, ours)
    except OSError:
        return is_alike


# ------------------------------------------------------------------------------ daemons


DAEMON: Final = "mbcap-watch run"


def daemons() -> dict[int, tuple[int, str | None]]:
    """Return whose each `mbcap-watch run` is, and its database if that can be told. Blocks."""
    found = {}
    for pid in running():
        with contextlib.suppress(OSError):  # it has just ended
            if is_daemon(arguments := _arguments_of(pid)):
                found[pid] = os.stat(f"/proc/{pid}").st_uid, _database_of(pid, arguments)
    return found


def is_daemon(arguments: list[str]) -> bool:
    """Whether a command line is that of `mbcap-watch run`."""
    names = [os.path.basename(argument).replace("_", "-") for argument in arguments[:4]]
    return ("mbcap-watch", "run") in itertools.pairwise(names)


def _database_of(pid: int, arguments: list[str]) -> str | None:
    """Return the database of a daemon; None if only root can tell."""
    named = _option(arguments, "--database")  # a command line is public
    try:
        variables = os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0")
        environ = dict(variable.partition("=")[::2] for variable in variables)
        here = os.readlink(f"/proc/{pid}/cwd")
        names = settings.ENV_PREFIX + "DATABASE", settings.DATABASE_VARIABLE
        path = named or next(filter(None, map(environ.get, names)), None)
        config = _option(arguments, "--config") or environ.get(settings.CONFIG_VARIABLE)
        toml = Path(f"/proc/{pid}/root" + os.path.join(here, config or settings.CONFIG_FILE))
        if config or toml.exists():
            path = path or tomllib.loads(toml.read_text(encoding="utf-8")).get("database")
        return os.path.normpath(os.path.join(here, path or settings.DEFAULT_DATABASE))
    except (OSError, ValueError):
        return named


def _option(arguments: list[str], name: str) -> str | None:
    for word, following in itertools.pairwise([*arguments, ""]):
        option, _, value = word.partition("=")
        if option == name:
            return value or following
    return None


# ------------------------------------------------------------------------------ locks


def judge_lock(here: Installation, real: Path, *, wal: bool) -> Finding:
    """Judge who holds the write lock, if anybody does; the kernel says it (F_GETLK, fcntl(2))."""
    locks = {real: _DATABASE_LOCKS} | ({Path(f"{real}-shm"): _WAL_WRITER} if wal else {})
    if hidden := [str(path) for path in locks if path.exists() and not place(path).readable]:
        return ok("lock", f"not known: {', '.join(hidden)} may not be read")
    who = holder(locks, fcntl.F_RDLCK)  # only what is locked for writing is in its way
    if not who:
        return ok("lock", "the write lock is free")
    text = f"the database has been locked for {duration(LOCK_SECONDS)} or more by {who}"
    remedy = "end the transaction that it keeps open (a shell, a backup, a stuck ingestor), or"
    remedy += " restart it; nothing is lost meanwhile"
    return here.finding("busy", text, remedy=remedy)


def holder(locks: Mapping[Path, tuple[int, int]], against: int) -> str:
    """Return who has one of the locks for `LOCK_SECONDS` on end; "" if they are free meanwhile."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        pids = [_held(path, *span, against) for path, span in locks.items()]
        pid = next((pid for pid in pids if pid is not None), None)
        if pid is None:
            return ""
        if time.monotonic() > deadline:
            return described(pid)
        time.sleep(0.02)


def _held(path: Path, start: int, length: int, against: int) -> int | None:
    """Return whose lock is in the way of one of the kind `against`, without taking it."""
    asked = struct.pack(_FLOCK, against, os.SEEK_SET, start, length, 0)
    try:
        with open(path, "rb") as file:
            kind, *_, pid = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except OSError:
        return None  # there is none, or `not_permitted` was reported
    return None if kind == fcntl.F_UNLCK else pid
