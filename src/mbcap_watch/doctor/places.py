"""Places: what is at a path, whether this user gets there, and why not."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from mbcap_watch.doctor.findings import Finding, Installation, quote

if TYPE_CHECKING:
    from collections.abc import Iterable

# A directory may hold a million files; hints need not know them all.
_LISTED: Final = 1_000


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


def blocked_way(installation: Installation, code: str, subject: str, path: Path) -> Finding | None:
    """Return a problem if a directory on the way to `path` may not be entered, or was deleted.

    Args:
        installation: whose path it is.
        code: of the finding for a directory that may not be entered.
        subject: of the finding.
        path: of a file.

    """
    for each in map(place, reversed(path.parents)):
        # A mount goes on showing a directory that was deleted where it was mounted from.
        if each.directory and each.status and not each.status.st_nlink:
            return installation.finding("deleted_mount", subject=subject, path=each.path)
        if each.directory and not each.searchable:
            text = f"{path} cannot be reached: user {os.geteuid()} may not enter {each.shown}"
            remedy = f"run as a user who may, or as root: chmod o+x {quote(each.path)}"
            return installation.finding(
                code, text, remedy=beyond_mode([each], os.X_OK) or remedy, subject=subject
            )
    return None


def beyond_mode(shut: Iterable[Place], wanted: int) -> str:
    """Return the remedy where not the mode of a file refuses; empty if it is the mode.

    Args:
        shut: places that this user was refused.
        wanted: `os.R_OK` and so on.

    """
    uid, groups = os.geteuid(), {os.getegid(), *os.getgroups()}
    paths = [
        quote(each.path)
        for each in shut
        if each.status and (uid == 0 or mode_of(each.status, uid, groups) & wanted == wanted)
    ]
    if not paths:
        return ""
    names = " ".join(paths)
    return (
        f"the mode would allow it, so something else refuses: lsattr -d {names} (as root: chattr"
        f" -i), getfacl {names} (setfacl), the capabilities of the unit or container, or a security"
        " module (dmesg)"
    )


def mode_of(status: os.stat_result, uid: int, groups: Iterable[int]) -> int:
    """Return what the mode of a file allows a user, as `os.R_OK` and so on."""
    shift = 6 if status.st_uid == uid else 3 if status.st_gid in groups else 0
    return status.st_mode >> shift & stat.S_IRWXO


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
