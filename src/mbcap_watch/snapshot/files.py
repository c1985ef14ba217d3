"""The hand-off: where a snapshot lies, how it is read and how it is published.

Imports neither aiosqlite nor watchdog, so that a read-only server can publish with this module
alone. What the bytes mean is in `codec`.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from pathlib import Path
from typing import NamedTuple

from mbcap_watch.errors import (
    SnapshotMalformed,
    SnapshotNotFound,
    SnapshotNotPublished,
    SnapshotRefused,
    SnapshotUnreadable,
)
from mbcap_watch.limits import LIMIT_ERRORS
from mbcap_watch.settings import DEFAULT_MAX_BYTES, SNAPSHOT_DIR_NAME
from mbcap_watch.snapshot import links
from mbcap_watch.snapshot.codec import (
    SNAPSHOT_NAME,
    Entry,
    Snapshot,
    encode,
    parse,
    parse_entries,
    stamped,
)

__all__ = [
    "SNAPSHOT_NAME",
    "Entry",
    "Snapshot",
    "encode",
    "ensure_snapshot_dir",
    "parse",
    "parse_entries",
    "read_file",
    "read_snapshot",
    "snapshot_dir",
    "snapshot_path",
    "write_snapshot",
]

_LEFTOVER_SECONDS = 3600.0


# ------------------------------------------------------------------------------ paths


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


# ------------------------------------------------------------------------------ reading


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
    """What was read.

    Attributes:
        data: the whole file.
        changed_at: when it was put in place, in seconds since the epoch by the filesystem's
            clock (its ctime, which a rename sets).

    """

    data: bytes
    changed_at: float


def read_file(path: Path, max_bytes: int) -> SnapshotFile:
    """Read the file at `path` to its end, without ever blocking on what is no file.

    The directory is listed first: on NFS that alone makes the client ask the server which file
    the name stands for (stat and open may be late by a minute). Symbolic links are followed as
    `links` says, so that a directory whose files are links into a `..data` directory works.

    Raises:
        SnapshotNotFound, SnapshotRefused, SnapshotUnreadable: as `read_snapshot`.

    """
    try:
        with links.opened(os.fspath(path.parent)) as directory:
            if not stat.S_ISDIR(os.fstat(directory).st_mode):
                raise _not_a_directory(path.parent)
            _revalidate(directory)
            with links.opened(path.name, directory) as descriptor:
                status = os.fstat(descriptor)
                _require_regular(path, status, max_bytes)
                data = _read_to_end(path, descriptor, status.st_size, max_bytes)
                return SnapshotFile(data, status.st_ctime)
    except links.ForeignLink as exc:
        raise SnapshotRefused(path, str(exc.strerror)) from exc
    except links.DanglingLink as exc:
        place = path.parent / exc.filename
        raise SnapshotNotFound(place, str(exc.strerror), unusual=True) from exc
    except FileNotFoundError as exc:
        raise SnapshotNotFound(path, "does not exist") from exc
    except NotADirectoryError as exc:
        raise _not_a_directory(path.parent / exc.filename) from exc
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise SnapshotRefused(path, "is a symbolic link that leads in a circle") from exc
        text = f"cannot be read: {exc.strerror}"
        raise SnapshotUnreadable(
            path, text, "limit" if exc.errno in LIMIT_ERRORS else None
        ) from exc


def _revalidate(directory: int) -> None:
    try:
        with os.scandir(directory) as listing:
            next(listing, None)  # one call to the kernel does it, however many files there are
    except OSError as exc:
        if exc.errno != errno.EBADF:  # that is one that may be entered but not listed
            raise


def _not_a_directory(path: Path) -> SnapshotNotFound:
    return SnapshotNotFound(path, "is not a directory", unusual=True)


def _require_regular(path: Path, status: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise SnapshotRefused(path, f"is {kind}, not a regular file")
    if status.st_size > max_bytes:
        raise _too_large(path, max_bytes)


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _too_large(path: Path, max_bytes: int) -> SnapshotRefused:
    return SnapshotRefused(path, f"is larger than max_bytes ({max_bytes:,} bytes)")


def _read_to_end(path: Path, descriptor: int, size_hint: int, max_bytes: int) -> bytes:
    """Read until end of file; the size that `fstat` tells is only a hint on some filesystems."""
    chunks: list[bytes] = []
    total = 0
    while chunk := os.read(descriptor, min(max(size_hint, 1 << 16), max_bytes - total) + 1):
        chunks.append(chunk)
        total += len(chunk)
        if total > max_bytes:
            raise _too_large(path, max_bytes)
    return b"".join(chunks)


# ------------------------------------------------------------------------------ publishing


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
    snapshot = stamped(snapshot)
    data = encode(snapshot)
    if len(data) > max_bytes:
        problem = f"takes {len(data):,} bytes, more than max_bytes ({max_bytes:,})"
        raise SnapshotMalformed(SNAPSHOT_NAME, problem)
    directory = _ensure(_directory(database, snapshot_dir))
    path = directory / SNAPSHOT_NAME
    temporary = directory / f"{SNAPSHOT_NAME}.{secrets.token_hex(8)}.tmp"
    try:
        remove_leftovers(directory, SNAPSHOT_NAME)
        try:
            _write_and_sync(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(directory)
    except OSError as exc:
        raise SnapshotNotPublished(path, f"cannot be written: {exc.strerror}") from exc
    return snapshot


def _write_and_sync(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every filesystem can
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path, name: str) -> None:
    """Remove temporary files for `name` that a killed process left an hour ago or more."""
    for path in directory.glob(f"{name}.*.tmp"):
        try:
            if time.time() - path.lstat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink()
        except OSError:
            continue  # just renamed or removed by its owner, or not ours to remove
