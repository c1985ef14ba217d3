"""A watchdog observer on one directory: quick, and honest about its health.

Uses private names of watchdog 7 (`_inotify_fd`, `_close_resources`); the package pins `<8` and a
test checks that they are there. Importing this fails where the system has no inotify.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from watchdog.events import DirDeletedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers.api import BaseObserver
from watchdog.observers.inotify import InotifyEmitter, InotifyObserver
from watchdog.observers.inotify_c import InotifyConstants, InotifyFD, Mask

from mbcap_watch.limits import no_thread, require_descriptors
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


class _Reader(InotifyFD):
    """Leaves nothing behind if there is no descriptor or no thread for it."""

    def __init__(self) -> None:
        try:
            super().__init__()
        except OSError:
            if hasattr(self, "_inotify_fd"):  # what is missing are those of its pipe
                os.close(self._inotify_fd)
            raise

    def start(self) -> None:
        try:
            super().start()
        except RuntimeError:
            self._close_resources()
            raise


class _Observer(InotifyObserver):
    """Reads as `_Reader` does, and has emitters of our own."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._inotify_fd = _Reader()
        self._inotify_fd.start()
        emitters: Any = partial(_Emitter, on_change, inotify_fd=self._inotify_fd)
        BaseObserver.__init__(self, emitters)


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
        require_descriptors(3)  # EMFILE of inotify_init means them, or the limit on instances
        try:
            self._observer = _Observer(on_change)
            try:
                self._arm()
            except BaseException:
                self.close()
                raise
        except RuntimeError as exc:
            raise no_thread() from exc

    def _arm(self) -> None:
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
