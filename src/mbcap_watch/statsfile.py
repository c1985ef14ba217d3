"""The stats file: what `run` keeps for `status`, for its owner alone.

One for each process, named after the database and the snapshot directory, so that `status` finds it
by the same settings, and finds two of them when two processes do the same work.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time
from typing import TYPE_CHECKING, Final

import msgspec

from mbcap_watch import atomic, runtime
from mbcap_watch.errors import QUOTED, printable
from mbcap_watch.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mbcap_watch.settings import Settings

# What makes a file stale. Source: CoreScope's own stats files.
STALE_SECONDS: Final = 5.0

# 240 points and two errors take 50 KB at most.
MAX_BYTES: Final = 1 << 20

_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Record(Stats, frozen=True, kw_only=True):
    """Stats as they are in the file.

    Attributes:
        monotonic: when they were true, by a clock that all processes of the machine share and
            nobody sets (CLOCK_MONOTONIC). Seconds.

    """

    monotonic: float

    @property
    def age(self) -> float:
        """Seconds since they were true; negative if that was before the machine was started."""
        return time.monotonic() - self.monotonic

    @property
    def fresh(self) -> bool:
        """Whether they are recent enough to say how the process is."""
        return 0 <= self.age <= STALE_SECONDS


def stem(settings: Settings) -> str:
    """Return what the names of all stats files for these settings begin with.

    As `meshcore.db-0123456789abcdef-`: for people the start of the database's name, for the rest 64
    bits of a digest of both paths.
    """
    paths = os.fsencode(settings.database) + b"\0" + os.fsencode(settings.snapshot_dir)
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", settings.database.name)[:40].lstrip(".")
    return f"{readable}-{hashlib.blake2b(paths, digest_size=8).hexdigest()}-"


NAME: Final = re.compile(r"[^/]*-[0-9a-f]{16}-[0-9]+\.json")
"""What all stats files are called: behind the stem is the process's id."""


class StatsFile:
    """A `heartbeat.Keeper`: the stats file of this process.

    Args:
        settings: of the bridge.
        environ: the environment, for `RUNTIME_DIRECTORY`.
        root: for tests.

    """

    blocks: Final = False  # it is in memory
    every: Final = 0.0

    def __init__(
        self, settings: Settings, environ: Mapping[str, str], root: Path = runtime.ROOT
    ) -> None:
        self._environ, self._root = environ, root
        self._stem = stem(settings)
        self._name = f"{self._stem}{os.getpid()}.json"
        self._directory: int | None = None
        self.path = runtime.home(environ, root) / self._name

    def write(self, stats: Stats) -> None:
        """Replace the file.

        Raises:
            runtime.Unfit: there is no directory for it.
            OSError: it cannot be written. The next try opens the directory anew: some are tidied.

        """
        record = Record(**msgspec.structs.asdict(stats), monotonic=time.monotonic())
        if self._directory is None:
            self._directory = runtime.open_home(self._environ, self._root)
            self._remove_dead(self._directory)
        try:
            atomic.replace(self._directory, self._name, msgspec.json.encode(record), 0o600)
        except OSError:
            self._close()
            raise

    def remove(self) -> None:
        """Take it away at the end: `status` then says that nothing runs."""
        if self._directory is not None:
            # What cannot be removed is stale in a moment, which `status` knows how to tell.
            with contextlib.suppress(OSError):
                os.unlink(self._name, dir_fd=self._directory)
            self._close()

    def _close(self) -> None:
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None

    def _remove_dead(self, directory: int) -> None:
        """Remove the files of killed processes that did the same work."""
        atomic.remove_leftovers(directory, self._name)
        for name in os.listdir(directory):
            if name.startswith(self._stem) and NAME.fullmatch(name):
                # What cannot be read or removed is told by `status`.
                with contextlib.suppress(OSError, runtime.Unfit):
                    if not read(self.path.parent, directory, name)[0].fresh:
                        os.unlink(name, dir_fd=directory)


def read(path: Path, directory: int, name: str) -> tuple[Record, int]:
    """Read the stats file `name` in the open `directory`, which is at `path`; and tell whose it is.

    Raises:
        runtime.Unfit: it is none, or not for us.
        OSError: it is gone, or cannot be read.

    """
    path = path / name
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode):
        raise runtime.Unfit(path, "is no regular file: not read", _REMOVE)
    if not runtime.is_believed(status.st_uid):
        raise runtime.not_for_us(path, status.st_uid)
    try:
        with open(os.open(name, _READ_FLAGS, dir_fd=directory), "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except PermissionError as exc:
        raise runtime.not_for_us(path, status.st_uid) from exc
    if len(data) > MAX_BYTES:
        raise runtime.Unfit(path, f"is larger than {MAX_BYTES} bytes: not read", _REMOVE)
    try:
        return msgspec.json.decode(data, type=Record), status.st_uid
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        remedy = "if an upgrade was installed meanwhile, restart the running mbcap-watch"
        said = printable(str(exc), QUOTED)
        raise runtime.Unfit(path, f"is not understood ({said})", remedy) from exc


_REMOVE: Final = "remove it; `run` makes what it needs"
