"""How changes are noticed: the mode, why it was chosen, and its repair."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from typing import TYPE_CHECKING, Any

from watchdog.utils import UnsupportedLibcError

from mbcap_watch.errors import printable
from mbcap_watch.results import WatchState
from mbcap_watch.watcher.mounts import UNKNOWN, mount_of

try:
    from mbcap_watch.watcher.inotify import InotifyWatch
except UnsupportedLibcError:  # macOS, a BSD
    _HAS_INOTIFY = False
else:
    _HAS_INOTIFY = True

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mbcap_watch.settings import Settings

_ASKED_FOR = "asked for by the setting mode"


class Watch:
    """Keeps an inotify watch alive where it is of use; everywhere else the bridge polls.

    Never raises for what the filesystem does: while there is no watch, there is polling.

    Attributes:
        state: how changes are noticed now.
        sees_every_change: whether inotify watches a filesystem that delivers every change.
        awaits_directory: whether inotify only waits for the directory to appear. Then every poll
            tries again.

    """

    def __init__(self, settings: Settings, on_change: Callable[[], None]) -> None:
        self._settings = settings
        self._on_change = on_change
        self._inotify: InotifyWatch | None = None
        self._rearms = -1
        self.sees_every_change = False
        self.awaits_directory = False
        self.state = WatchState()

    @property
    def polling(self) -> bool:
        """Whether there is no inotify watch to rely on."""
        return self._inotify is None

    def update(self, **changes: Any) -> None:
        """Change fields of `state`."""
        self.state = dataclasses.replace(self.state, **changes)

    def refresh(self) -> None:
        """Arm, check, or repair the watch; say in `state` what came of it. Blocks."""
        self.awaits_directory = False
        if self._inotify is not None:
            problem = self._inotify.problem()
            if problem is None:
                return
            self.close()
            self.update(last_problem=problem)
        directory = self._settings.snapshot_dir
        # Until the directory above is listed, an NFS client believes for up to a minute that this
        # one is missing, or still the one that was replaced.
        with contextlib.suppress(OSError), os.scandir(directory.parent) as above:
            next(above, None)
        try:
            why, degraded = self._arm(directory), False
        except OSError as exc:
            self.awaits_directory = isinstance(exc, FileNotFoundError)
            degraded = not self.awaits_directory
            why = f"{directory} does not exist"
            if degraded:
                why = f"no inotify watch on {directory} for now: {exc.strerror}"
        # `why` may hold the name of a directory.
        self.update(
            mode="poll" if self.polling else "inotify", why=printable(why), degraded=degraded
        )

    def _arm(self, directory: Path) -> str:
        """Arm the watch if it is of use; return why it polls, or watches."""
        mode = self._settings.mode
        if mode == "poll":
            return _ASKED_FOR
        if not _HAS_INOTIFY:
            return "this system has no inotify"
        mount = mount_of(directory)
        if mode == "auto" and mount == UNKNOWN:
            return "without /proc it is unknown whether inotify sees every change"
        if mode == "auto" and not mount.delivers_inotify:
            return f"inotify does not see every change on {mount.type}"
        self._inotify = InotifyWatch(directory, self._on_change)
        self.sees_every_change = mount.delivers_inotify
        self._rearms += 1
        self.update(armed_since=time.time(), rearms=self._rearms)
        said = f"inotify sees every change on {mount.type}"
        return said if mount.delivers_inotify else _ASKED_FOR

    def close(self) -> None:
        """Disarm the watch. Blocks."""
        if self._inotify is not None:
            self._inotify.close()
            self._inotify, self.sees_every_change = None, False
            self.update(armed_since=None)
