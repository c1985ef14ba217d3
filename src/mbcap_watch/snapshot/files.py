"""The hand-off: where a snapshot lies, how it is read and how it is published.

Imports neither aiosqlite nor watchdog, so that a read-only server can publish with this module
alone. What the bytes mean is in `codec`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from mbcap_watch.errors import (
    SnapshotMalformed,
    SnapshotNotFound,
    SnapshotNotPublished,
    SnapshotRefused,
    SnapshotUnreadable,
)
from mbcap_watch.limits import LIMIT_ERRORS, close_reader
from mbcap_watch.settings import DEFAULT_MAX_BYTES, SNAPSHOT_DIR_NAME
from mbcap_watch.snapshot import codec, links
from mbcap_watch.snapshot.codec import SNAPSHOT_NAME, Entry, Snapshot, parse, parse_entries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mbcap_watch.errors import Cause

# Of codec, for whoever reads and publishes.
__all__ = ["SNAPSHOT_NAME", "Entry", "Snapshot", "parse", "parse_entries"]

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_LEFTOVER_SECONDS: Final = 3600.0
# By the letter that `ls -l` shows.
_KINDS = {"d": "a directory", "p": "a FIFO", "s": "a socket", "c": "a device", "b": "a device"}


def snapshot_dir(database: str | os.PathLike[str]) -> Path:
    """Return the directory of the snapshot that belongs to `database`."""
    return Path(database).parent / SNAPSHOT_DIR_NAME


def snapshot_path(database: str | os.PathLike[str]) -> Path:
    """Return the path of the snapshot that belongs to `database`."""
    return snapshot_dir(database) / SNAPSHOT_NAME


def ensure_snapshot_dir(database: str | os.PathLike[str]) -> Path:
    """Create the snapshot's directory (mode 0755, less the umask) if need be; return it.

    Raises:
        SnapshotNotPublished: it cannot be created.

    """
    return _ensure(snapshot_dir(database))


def _ensure(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as exc:
        raise SnapshotNotPublished(directory, f"cannot be created: {exc.strerror}") from exc
    return directory


def _directory(database: str | os.PathLike[str], override: str | os.PathLike[str] | None) -> Path:
    return snapshot_dir(database) if override is None else Path(override)


def read_snapshot(
    database: str | os.PathLike[str],
    *,
    snapshot_dir: str | os.PathLike[str] | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Snapshot:
    """Read the snapshot that belongs to `database`.

    Args:
        database: the path of the database; it is not opened.
        snapshot_dir: where the snapshot lies, if not beside the database.
        max_bytes: a larger file is refused.

    Raises:
        SnapshotNotFound: there is none; treat it as "nothing to persist".
        SnapshotMalformed: its bytes are no snapshot.
        SnapshotRefused: it is not a regular file, too large, or behind a link of another user
            that does not lead to a file of that user.
        SnapshotUnreadable: the operating system refused.

    """
    path = _directory(database, snapshot_dir) / SNAPSHOT_NAME
    return parse(read_file(path, max_bytes).data, source=str(path))


class SnapshotFile(NamedTuple):
    """What was read: the whole file, and its ctime, which a rename sets."""

    data: bytes
    changed_at: float


def read_file(path: Path, max_bytes: int) -> SnapshotFile:
    """Read the file at `path` to its end. Never blocks on a FIFO or a device.

    The directory is listed first: on NFS that alone makes the client ask the server which file
    the name stands for (stat and open may be late by a minute). Symbolic links are followed as
    `links` says, so that a directory whose files are links into a `..data` directory works.

    Raises:
        SnapshotNotFound, SnapshotRefused, SnapshotUnreadable: as `read_snapshot`.

    """
    try:
        with links.opened(os.fspath(path.parent)) as directory:
            # It may not be listed, or no directory: what follows tells.
            with _ignoring(errno.EBADF, errno.ENOTDIR), os.scandir(directory) as listing:
                next(listing, None)  # one call to the kernel does it, however many files there are
            with links.opened(path.name, directory) as descriptor:
                return _read(path, descriptor, max_bytes)
    except links.ForeignLink as exc:
        raise SnapshotRefused(path, str(exc.strerror)) from exc
    except links.DanglingLink as exc:
        place = path.parent / exc.filename
        raise SnapshotNotFound(place, str(exc.strerror), unusual=True) from exc
    except FileNotFoundError as exc:
        raise SnapshotNotFound(path, "does not exist") from exc
    except NotADirectoryError as exc:
        place = path.parent / exc.filename
        raise SnapshotNotFound(place, "is not a directory", unusual=True) from exc
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise SnapshotRefused(path, "is a symbolic link that leads in a circle") from exc
        raise SnapshotUnreadable(path, f"cannot be read: {exc.strerror}", cause_of(exc)) from exc


def cause_of(error: OSError) -> Cause:
    """Return what is behind an error on the way to the snapshot, or of reading it."""
    if error.errno in LIMIT_ERRORS:
        return "limit"
    if error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
        return "snapshot_unreadable"
    return "filesystem_failed"


def _read(path: Path, descriptor: int, max_bytes: int) -> SnapshotFile:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS[stat.filemode(status.st_mode)[0]]
        raise SnapshotRefused(path, f"is {kind}, not a regular file")
    chunks: list[bytes] = []
    # On some filesystems the size that `fstat` tells is only a hint.
    total, size = 0, status.st_size
    while size <= max_bytes:
        chunk = os.read(descriptor, min(max(size, 1 << 16), max_bytes - total) + 1)
        if not chunk:
            return SnapshotFile(b"".join(chunks), status.st_ctime)
        chunks.append(chunk)
        total += len(chunk)
        size = max(size, total)
    raise SnapshotRefused(path, f"is larger than max_bytes ({max_bytes:,} bytes)")


def write_snapshot(
    database: str | os.PathLike[str],
    snapshot: Snapshot,
    *,
    snapshot_dir: str | os.PathLike[str] | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Snapshot:
    """Publish `snapshot`: replace `snapshot.json` as a whole, by rename. The database stays shut.

    The bytes are flushed to disk before the rename and the directory after it, so that a power
    cut leaves the old snapshot or the new one. Each call fills a temporary file of its own, so
    that publishers at the same time, those of other programs included, never tear the file.

    Args:
        database: the path of the database that the snapshot is about; it is not opened.
        snapshot: what to publish; without `written_at` the current UTC time is stamped.
        snapshot_dir: where to publish, if not beside the database. Created if missing.
        max_bytes: what its readers accept.

    Returns:
        The snapshot as published, with its `written_at`.

    Raises:
        SnapshotMalformed: a reader would not accept it, or leave an entry out.
        SnapshotNotPublished: the operating system refused; the old snapshot is still there.

    """
    snapshot = codec.stamped(snapshot)
    data = codec.encode(snapshot)
    if len(data) > max_bytes:
        problem = f"takes {len(data):,} bytes, more than max_bytes ({max_bytes:,})"
        raise SnapshotMalformed(SNAPSHOT_NAME, problem)
    directory = _ensure(_directory(database, snapshot_dir))
    path = directory / SNAPSHOT_NAME
    temporary = directory / f"{SNAPSHOT_NAME}.{secrets.token_hex(8)}.tmp"
    try:
        remove_leftovers(directory, SNAPSHOT_NAME)
        try:
            with open(os.open(temporary, _CREATE, 0o644), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(directory)
    except OSError as exc:
        raise SnapshotNotPublished(path, f"cannot be written: {exc.strerror}") from exc
    return snapshot


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with _ignoring(errno.EINVAL, errno.ENOTSUP):  # not every filesystem can
            os.fsync(descriptor)
    finally:
        close_reader(descriptor)


@contextlib.contextmanager
def _ignoring(*numbers: int) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno not in numbers:
            raise


def remove_leftovers(directory: Path, name: str) -> None:
    """Remove temporary files for `name` that a killed process left an hour ago or more."""
    for path in directory.glob(f"{name}.*.tmp"):
        # It may just be renamed or removed by its owner, or not be ours to remove.
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink()
