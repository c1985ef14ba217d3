"""Open what a path leads to, following no link that another user may have put there as a trap.

Whoever may write into the snapshot's directory can put a symbolic link in place of the file, and
whoever may write into the directory above can put one in place of the directory. A daemon of root
would follow it to files that the owner of the link may not read, and its errors would tell what is
there. So one rule holds for every link on the way, wherever it lies:

A link is followed if it is root's or our own user's, or if what it leads to belongs to the owner of
the link. (Kubernetes' links into `..data` are root's.)

The kernel has no such rule, so the path is walked here, name by name. Each name is opened relative
to the directory that was opened before it, without following it (O_PATH: devices and files of the
kernel do not notice), and only what was opened is judged: nothing can be exchanged in between.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_LINKS: Final = 40  # as the kernel (path_resolution(7))
_LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO that takes the place of the file just now does not hold us up.
_READ_FILE: Final = _READ | os.O_NONBLOCK | os.O_NOCTTY


class ForeignLink(PermissionError):
    """A link of another user leads to nothing of that user's. Says no more about what is there."""


class DanglingLink(FileNotFoundError):
    """The link `filename` leads to nothing."""


class _Place(NamedTuple):
    """What was found on the way: `name` in the open `directory`; `found` is a descriptor of it."""

    directory: int
    name: str
    found: int


@contextlib.contextmanager
def opened(path: str, start: int | None = None) -> Iterator[int]:
    """Open what `path` leads to, for as long as the block lasts.

    Regular files and directories are opened for reading. Everything else, and a directory that may
    not be listed, is opened as a mere place (O_PATH), so that nothing is set off.

    Args:
        path: the path.
        start: an open directory that a relative path begins at; else the working directory.

    Raises:
        ForeignLink: a link on the way is not followed.
        DanglingLink: a link that is followed leads to nothing.
        NotADirectoryError: what stands at `filename` should be a directory.
        OSError: anything else.

    """
    with contextlib.closing(_Way()) as way:
        try:
            place = way.walk_from(path, start)
        except OSError:
            if way.strangers:  # the error may not reveal what is there
                raise way.foreign() from None
            raise
        yield way.open(place)


class _Way:
    """Walks along a path; `strangers` are the owners of links that are neither root's nor ours."""

    def __init__(self) -> None:
        self._opened: set[int] = set()
        self._links = 0
        self.strangers: set[int] = set()

    def walk_from(self, path: str, start: int | None) -> _Place:
        """Return what `path` leads to; errors tell by its names where the way ends."""
        root = "/" if path.startswith("/") else ""
        place = self._place(root or ".") if start is None else _Place(start, ".", start)
        names = _names(path)
        for count, name in enumerate(names):
            links = self._links
            try:
                place = self._step(place, name)
            except (FileNotFoundError, NotADirectoryError) as exc:
                if self._links > links:
                    link = root + "/".join(names[: count + 1])
                    raise DanglingLink(errno.ENOENT, "is a symbolic link to nothing", link) from exc
                exc.filename = root + "/".join(names[:count])
                raise
            self._pass(place)
        return place

    def open(self, place: _Place) -> int:
        """Open for reading what was found, if it is a regular file or a directory."""
        self._require_owner(place.found)
        status = os.fstat(place.found)
        if stat.S_ISREG(status.st_mode):
            flags = _READ_FILE
        elif stat.S_ISDIR(status.st_mode):
            flags = _READ | os.O_DIRECTORY
        else:
            return place.found
        try:
            # By its name once more: only then NFS asks the server which file that is.
            descriptor = self._keep(os.open(place.name, flags, dir_fd=place.directory))
        except PermissionError:
            if stat.S_ISDIR(status.st_mode):
                return place.found
            raise
        self._require_owner(descriptor)
        return descriptor

    def foreign(self) -> ForeignLink:
        """Return what to raise for a link that is not followed."""
        owner = min(self.strangers)
        text = f"a symbolic link of user {owner} on the way leads to nothing of user {owner}'s"
        return ForeignLink(errno.EACCES, f"{text}, and is not followed")

    def _step(self, place: _Place, name: str) -> _Place:
        """Return what `name` in a directory leads to."""
        try:
            # With O_DIRECTORY, a filesystem that is mounted on demand is mounted.
            return self._place(name, place.found, os.O_DIRECTORY)
        except NotADirectoryError:  # a link is none, either
            following = self._place(name, place.found)
        status = os.fstat(following.found)
        if not stat.S_ISLNK(status.st_mode):
            return following
        self._links += 1
        if self._links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if status.st_uid not in (0, os.geteuid()):
            self.strangers.add(status.st_uid)
        elif not status.st_size:
            # A link of the kernel's own, as /proc/1/root: its text is not where it leads.
            found = self._keep(os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=place.found))
            return _Place(found, ".", found)
        target = os.readlink("", dir_fd=following.found)
        if target.startswith("/"):
            place = self._place("/")
        for each in _names(target):
            place = self._step(place, each)
            self._pass(place)
        return place

    def _place(self, name: str, directory: int | None = None, flags: int = 0) -> _Place:
        found = self._keep(os.open(name, _LOOK | flags, dir_fd=directory))
        return _Place(found if directory is None else directory, name, found)

    def _keep(self, descriptor: int) -> int:
        self._opened.add(descriptor)
        return descriptor

    def _pass(self, place: _Place) -> None:
        """Close what lies behind `place`: a link may name thousands of directories."""
        self.close(place.directory, place.found)

    def close(self, *needed: int) -> None:
        """Close what was opened, but for what is still needed."""
        for descriptor in self._opened.difference(needed):
            self._opened.remove(descriptor)
            os.close(descriptor)

    def _require_owner(self, descriptor: int) -> None:
        if self.strangers and self.strangers != {os.fstat(descriptor).st_uid}:
            raise self.foreign()


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name]
