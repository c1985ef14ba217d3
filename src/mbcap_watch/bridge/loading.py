"""Loading the snapshot: the desired state, and whether the files are as they were."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from mbcap_watch.errors import SnapshotError, without_frames
from mbcap_watch.snapshot.files import SNAPSHOT_NAME, parse, read_file
from mbcap_watch.store import plan
from mbcap_watch.store.descriptors import identity_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mbcap_watch.settings import Settings


# What `stat` says of a file. One that is replaced twice within a tick of the kernel's clock may
# keep its stamp, so that of a file which was changed a moment ago is None.
Stamp: TypeAlias = "tuple[int, ...] | None"
_STAMP_SECONDS: Final = 1.0


class Fingerprint(NamedTuple):
    """Tells one state of the files from another.

    Attributes:
        snapshot: of its bytes, or of what kept them from being read. 64 bits of SipHash with a key
            of this process: nothing is stored. Of 12 MB it takes 2.5 ms, SHA-256 9 ms.
        database: which file is at the database's path (device and inode); None if there is none.
            A backup that was moved into place wants the snapshot anew.

    """

    snapshot: int
    database: tuple[int, int] | None


class LoadedSnapshot(NamedTuple):
    """The snapshot file at one moment.

    Attributes:
        fingerprint: of the files at that moment.
        desired: what it wants written; None if it is no usable snapshot, or the known one.
        written_at: `writtenAt` as in the file.
        error: why there is no desired state.
        changed_at: when the file was put in place, in seconds since the epoch.
        size: of the file, in bytes; 0 if there is no desired state.
        stamp: of the file, taken before it was read.

    """

    fingerprint: Fingerprint
    desired: plan.DesiredState | None = None
    written_at: str | None = None
    error: SnapshotError | None = None
    changed_at: float | None = None
    size: int = 0
    stamp: Stamp = None


def load(
    settings: Settings,
    known: Fingerprint | None = None,
    alive: Callable[[], None] = lambda: None,
    stamp: Stamp = None,
) -> LoadedSnapshot:
    """Read the snapshot and see what it wants. Blocks.

    Args:
        settings: which files, and how large the snapshot may be.
        known: if the files still have this fingerprint, the snapshot is not parsed.
        alive: called after each step; a million entries take a small machine many seconds.
        stamp: a known file that still has it is not read, unless the database is another one; None
            where `stat` is not to be relied on.

    """
    path = settings.snapshot_dir / SNAPSHOT_NAME
    database, now = identity_of(str(settings.database)), _stamp_of(path)
    # The watch knows the directory's filesystem. On another, behind a link, `stat` may be late.
    here = _stamp_of(path.parent)
    if now and (time.time() - now[-1] / 1e9 < _STAMP_SECONDS or not here or here[0] != now[0]):
        now = None
    if known and known.database == database and stamp is not None and now == stamp:
        return LoadedSnapshot(known, stamp=now)
    try:
        data, changed_at = read_file(path, settings.max_bytes)
    except SnapshotError as exc:
        fingerprint = Fingerprint(hash((type(exc), str(exc))), database)
        return LoadedSnapshot(fingerprint, error=without_frames(exc))
    fingerprint = Fingerprint(hash(data), database)
    if fingerprint == known:
        return LoadedSnapshot(fingerprint, stamp=now)
    alive()
    try:
        snapshot = parse(data, source=str(path))
    except SnapshotError as exc:
        return LoadedSnapshot(fingerprint, error=without_frames(exc), stamp=now)
    size = len(data)
    del data
    alive()
    desired = plan.desired_state(snapshot.entries)
    alive()
    return LoadedSnapshot(fingerprint, desired, snapshot.written_at, None, changed_at, size, now)


def database_stamp(database: Path) -> tuple[Stamp, Stamp]:
    """Return what changes whenever somebody writes to the database or its `-wal`."""
    real = os.path.realpath(database)  # that is where SQLite has the -wal
    beside = _stamp_of(f"{real}-wal")
    # Root's SQLite gives a -wal that it opens to the owner of the database, and so the -wal gets
    # another ctime from whoever only reads.
    return _stamp_of(real), beside and beside[:-1]


def settled(stamp: tuple[Stamp, Stamp]) -> tuple[Stamp, Stamp] | None:
    """Return the stamp unless somebody wrote a moment ago.

    What is being committed changes the stamp first, and can be read only after an fsync.
    """
    written = (part[3] / 1e9 for part in stamp if part)
    return None if any(abs(time.time() - at) < _STAMP_SECONDS for at in written) else stamp


def _stamp_of(path: str | Path) -> Stamp:
    try:
        status = os.stat(path)
    except OSError:
        return None  # reading or opening it tells why
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, *times
