"""A watchdog observer on one directory: quick, and honest about its health.

Uses private names of watchdog 7 (`_emitter_class`, `_inotify_fd`); the package pins `<8` and a
test checks that they are there. Importing this fails where the system has no inotify.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from watchdog.events import DirDeletedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers.inotify import InotifyEmitter, InotifyObserver
from watchdog.observers.inotify_c import InotifyConstants, Mask

from mbcap_watch.limits import no_thread, require_descriptors, require_threads
from mbcap_watch.snapshot.codec import SNAPSHOT_NAME

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

# A rename in the directory, and the directory's own end. With IN_MOVED_FROM, watchdog holds an
# event back for up to half a second to pair it, and everything behind it.
_MASK: Final = Mask(
    InotifyConstants.IN_MOVED_TO
    | InotifyConstants.IN_DELETE_SELF
    | InotifyConstants.IN_MOVE_SELF
    | InotifyConstants.IN_ONLYDIR
)

# Kubernetes replaces the files of a volume all at once, by renaming the link `..data`.
_NAMES: Final = (SNAPSHOT_NAME, "..data")


class _Emitter(InotifyEmitter):
    """Tells of an event itself; through the observer's queue and thread it takes 0.3 ms longer."""

    def __init__(self, on_change: Callable[[], None], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._on_change = on_change

    def get_event_mask_from_filter(self) -> Mask:
        return _MASK

    def queue_event(self, event: FileSystemEvent) -> None:
        # By path, never by type: a rename inside the directory is a move, from outside a creation.
        path = os.fsdecode(event.dest_path or event.src_path)
        if os.path.basename(path) in _NAMES or isinstance(event, DirDeletedEvent):
            self._on_change()


class InotifyWatch:
    """An armed watch. All its methods may block and belong off the event loop."""

    def __init__(self, directory: Path, on_change: Callable[[], None]) -> None:
        """Arm the watch on where `directory` leads to.

        A watchdog thread calls `on_change` for every replacement of the snapshot, and when the
        directory goes. It must not block or raise.

        Raises:
            OSError: the directory cannot be watched. Nothing is left behind.

        """
        self._directory = directory
        self._was = os.stat(directory)
        # Descriptors: an inotify instance and a pipe. Threads: one reads the instance, one is for
        # the watch, one for handlers, though there are none. A constructor that fails would leak.
        require_descriptors(3)
        require_threads(3)
        try:
            self._observer = InotifyObserver()
            try:
                self._arm(on_change)
            except BaseException:
                self.close()
                raise
        except RuntimeError as exc:  # somebody else has taken the thread meanwhile
            raise no_thread() from exc

    def _arm(self, on_change: Callable[[], None]) -> None:
        self._observer._emitter_class = partial(_Emitter, on_change)  # type: ignore[assignment]  # noqa: SLF001
        self._reader = self._observer._inotify_fd  # noqa: SLF001
        self._descriptor = self._reader._inotify_fd  # noqa: SLF001
        # watchdog opens it without IN_CLOEXEC; a program that the host starts would keep it.
        os.set_inheritable(self._descriptor, False)  # noqa: FBT003
        self._observer.schedule(FileSystemEventHandler(), os.path.realpath(self._directory))
        self._observer.start()
        self._kernel_watches = self._read_kernel_watches()
        if not self._kernel_watches:  # watchdog swallows EACCES
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self._directory))

    def problem(self) -> str | None:
        """Return what is wrong with the watch, or None while it is sound.

        A watch can die in silence: the directory is moved, replaced or mounted over, a thread of
        watchdog ends. So the path must still lead to the directory that was armed, the threads
        must live, and the kernel must still list the watch.
        """
        try:
            if not os.path.samestat(os.stat(self._directory), self._was):
                return "the directory was replaced"
        except OSError as exc:
            return f"the directory cannot be reached ({exc.strerror})"
        threads: list[threading.Thread] = [self._observer, self._reader, *self._observer.emitters]
        if not all(thread.is_alive() for thread in threads):
            return "a thread of the observer has ended"
        try:
            if self._read_kernel_watches() != self._kernel_watches:
                return "the kernel has dropped the watch"
        except OSError as exc:  # no descriptor left, say: what cannot be checked is not trusted
            return f"the watch cannot be checked ({exc.strerror})"
        return None

    def close(self) -> None:
        """Stop the observer and wait for its threads."""
        self._observer.stop()
        if self._observer.is_alive():
            self._observer.join(5.0)  # it takes half a second (measured)

    def _read_kernel_watches(self) -> list[str]:
        """Return the watches that the kernel holds for us (proc(5), `/proc/pid/fdinfo`)."""
        try:
            text = Path(f"/proc/self/fdinfo/{self._descriptor}").read_text(encoding="ascii")
        except FileNotFoundError as exc:
            raise OSError(errno.ENOSYS, "a watch cannot be checked without /proc") from exc
        return [line for line in text.splitlines() if line.startswith("inotify ")]
