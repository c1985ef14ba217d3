"""Where the stats file may be: a directory in memory, and nobody else's.

`run` keeps it in `RUNTIME_DIRECTORY`, which systemd sets (`RuntimeDirectory=`), and elsewhere in a
directory of its user's in /dev/shm, which is in memory on a host and in a container alike. `status`
looks into all of these that there are.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mbcap_watch.errors import MbcapWatchError, printable
from mbcap_watch.watcher.mounts import mount_of

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT: Final = Path("/")  # tests have one of their own

# Of services of the system, each instance with one of its own, of services of users, and others.
_PATTERNS: Final = ("run/mbcap-watch*", "run/user/*/mbcap-watch*", "dev/shm/mbcap-watch-*")

_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Unfit(MbcapWatchError):
    """A file or directory that is not written to, or not believed; with a remedy."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)
        self.path, self.problem, self.remedy = path, problem, remedy

    @property
    def what(self) -> str:
        """What is wrong with which path, without the remedy."""
        return printable(f"{self.path}: {self.problem}")

    def __str__(self) -> str:
        return printable(f"{self.what}; {self.remedy}")


def home(environ: Mapping[str, str], root: Path = ROOT) -> Path:
    """Return the directory in which `run` keeps its stats file."""
    return _named(environ) or root / f"dev/shm/mbcap-watch-{os.geteuid()}"


def _named(environ: Mapping[str, str]) -> Path | None:
    # systemd.exec(5): several are separated by colons. With DynamicUser= it is a link.
    named = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(named).resolve() if named.startswith("/") else None


def open_home(environ: Mapping[str, str], root: Path = ROOT) -> int:
    """Open the directory for writing into, having made it if need be.

    Raises:
        Unfit: it may not be used.
        OSError: it cannot be.

    """
    path = home(environ, root)
    if _named(environ) is None:
        if mount_of(path.parent).type not in ("tmpfs", "ramfs"):
            problem = f"{path.parent} is on a disk, which regular writes would wear out"
            raise Unfit(path, problem, _NAME_ONE)
        with contextlib.suppress(FileExistsError):  # it is checked below
            os.mkdir(path, 0o755)  # the files are for their owner alone
    descriptor, owner = _open(path)
    if owner != os.geteuid():
        os.close(descriptor)
        raise Unfit(path, f"belongs to uid {owner}, and this is {os.geteuid()}", _NAME_ONE)
    return descriptor


_NAME_ONE: Final = "name a directory of this user's, in memory, in RUNTIME_DIRECTORY"


def places(environ: Mapping[str, str], root: Path = ROOT) -> list[Path]:
    """Return every directory in which somebody may keep a stats file."""
    named = _named(environ)
    found = [path for pattern in _PATTERNS for path in sorted(root.glob(pattern))]
    return list(dict.fromkeys([named, *found] if named else found))


def open_place(path: Path) -> int:
    """Open one of these for reading.

    Raises:
        Unfit: it is not to be believed, or not for this user.
        OSError: it cannot be opened.

    """
    try:
        return _open(path)[0]
    except PermissionError as exc:
        raise not_for_us(path, os.lstat(path).st_uid) from exc


def _open(path: Path) -> tuple[int, int]:
    """Return a descriptor, and whose directory it is, and so whose word its files are."""
    descriptor = os.open(path, _FLAGS)
    status = os.fstat(descriptor)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(descriptor)
        raise Unfit(path, "others may write there, so it is not trusted", "remove it (ls -ld)")
    return descriptor, status.st_uid


def is_believed(uid: int) -> bool:
    """Whether files of `uid` are: anybody can put into /dev/shm what we would like to hear.

    Root asks on behalf of all, and is shown whose word it is.
    """
    return os.geteuid() in (0, uid) or uid == 0


def not_for_us(path: Path, owner: int) -> Unfit:
    """Return what to raise for something that another user may read."""
    whom = "ask as root" + (f", or as uid {owner}" if owner else "")
    problem = f"belongs to uid {owner}, and uid {os.geteuid()} may not read it"
    return Unfit(path, problem, f"{whom} (sudo)")
