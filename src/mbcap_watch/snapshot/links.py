"""Open what a path leads to, following no link that another user may have put there as a trap.

Whoever may write into the snapshot's directory, or into the one above, can put a symbolic link in
place of the file or the directory. A daemon that runs as root would follow it to files that the
owner of the link may not read. Its errors would tell what is there. So one rule holds for every
link on the way: it is followed if it is root's or our own user's, or if what it leads to belongs
to the owner of the link. (Kubernetes' links into `..data` are root's.)

The kernel has no such rule, so the path is walked here, name by name. Each name is opened relative
to the directory that was opened before it, without following it (O_PATH: devices and files of the
kernel do not notice), and only what was opened is judged: nothing can be exchanged in between.
Where there is no O_PATH (macOS), the kernel follows all links: run nothing as root there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, Final

from mbcap_watch.limits import close_reader

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_LINKS: Final = 40  # as the kernel (path_resolution(7))
_PLACE: Final = getattr(os, "O_PATH", 0)
# O_NONBLOCK: a FIFO that takes the place of the file just now does not hold us up.
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY


class ForeignLink(PermissionError):
    """A link of another user leads to nothing of that user's. Says no more about what is there."""

    def __init__(self, owner: int) -> None:
        text = f"a symbolic link of user {owner} on the way leads to nothing of user {owner}'s"
        super().__init__(errno.EACCES, f"{text}, and is not followed")


class DanglingLink(FileNotFoundError):
    """The link `filename` leads to nothing."""


@contextlib.contextmanager
def opened(path: str, start: int | None = None) -> Iterator[int]:
    """Open what `path` leads to, for as long as the block lasts.

    Regular files and directories are opened for reading. Everything else, and a directory that may
    not be listed, is opened as a mere place (O_PATH), so that nothing is set off. A relative path
    begins at the open directory `start`, or else at the working directory.

    Raises:
        ForeignLink, DanglingLink: as they say.
        NotADirectoryError: what stands at `filename` should be a directory.

    """
    with contextlib.closing(_Way()) as way:
        if not hasattr(os, "O_PATH"):
            yield way.keep(os.open(path, _READ, dir_fd=start))
            return
        try:
            way.walk(path, start)
        except OSError:
            if way.strangers:  # the error may not reveal what is there
                raise ForeignLink(min(way.strangers)) from None
            raise
        yield way.open()


class _Way:
    """Walks along a path; `strangers` are the owners of links that are neither root's nor ours."""

    def __init__(self) -> None:
        self.strangers: set[int] = set()
        self._opened: set[int] = set()

    def walk(self, path: str, start: int | None) -> None:
        """Go to what `path` leads to; errors tell by its names where the way ends."""
        root = "/" if path.startswith("/") else ""
        first = self._look(root or ".", None)[0] if start is None else start
        self._go(first, ".", first)
        names = list(filter(None, path.split("/")))
        # What is still to be walked, the next name last: to which name of `path` it belongs, and
        # whether a link led there.
        ahead = [(name, count, False) for count, name in enumerate(names)][::-1]
        links = 0
        while ahead:
            name, count, linked = ahead.pop()
            try:
                found, link = self._look(name, self._found)
            except (FileNotFoundError, NotADirectoryError) as exc:
                if linked:
                    place = root + "/".join(names[: count + 1])
                    text = "is a symbolic link to nothing"
                    raise DanglingLink(errno.ENOENT, text, place) from exc
                exc.filename = root + "/".join(names[:count])
                raise
            if link is None:
                self._go(self._found, name, found)
                continue
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if link.st_uid not in (0, os.geteuid()):
                self.strangers.add(link.st_uid)
            elif not link.st_size:
                # A link of the kernel's own, as /proc/1/root: its text is not where it leads.
                found = self.keep(os.open(name, _PLACE, dir_fd=self._found))
                self._go(found, ".", found)
                continue
            target = os.readlink("", dir_fd=found)
            ahead += [(each, count, True) for each in reversed(target.split("/")) if each]
            if target.startswith("/"):
                found, _ = self._look("/", None)
                self._go(found, ".", found)

    def open(self) -> int:
        """Open for reading what was found, if it is a regular file or a directory."""
        self._require_owner(self._found)
        mode = os.fstat(self._found).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return self._found
        try:
            # By its name once more: only then NFS asks the server which file that is.
            flags = _READ | os.O_NOFOLLOW
            descriptor = self.keep(os.open(self._name, flags, dir_fd=self._directory))
        except PermissionError:
            if stat.S_ISDIR(mode):
                return self._found
            raise
        self._require_owner(descriptor)
        return descriptor

    def _require_owner(self, descriptor: int) -> None:
        if self.strangers and self.strangers != {os.fstat(descriptor).st_uid}:
            raise ForeignLink(min(self.strangers))

    def _look(self, name: str, directory: int | None) -> tuple[int, os.stat_result | None]:
        """Return a descriptor of `name`, and what `stat` says of it if it is a link."""
        flags = _PLACE | os.O_NOFOLLOW
        try:
            # With O_DIRECTORY, a filesystem that is mounted on demand is mounted.
            return self.keep(os.open(name, flags | os.O_DIRECTORY, dir_fd=directory)), None
        except NotADirectoryError:  # a link is none, either
            found = self.keep(os.open(name, flags, dir_fd=directory))
        status = os.fstat(found)
        return found, status if stat.S_ISLNK(status.st_mode) else None

    def _go(self, directory: int, name: str, found: int) -> None:
        """Note where it is: `name` in the open `directory`; `found` is a descriptor of it."""
        self._directory, self._name, self._found = directory, name, found
        self.close(directory, found)  # a link may name thousands of directories

    def keep(self, descriptor: int) -> int:
        """Have `close` close it."""
        self._opened.add(descriptor)
        return descriptor

    def close(self, *needed: int) -> None:
        """Close what was opened, but for what is still needed."""
        for descriptor in self._opened.difference(needed):
            self._opened.remove(descriptor)
            close_reader(descriptor)
