"""`check`, the snapshot: its directory, the file, its age; and how changes are noticed."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mbcap_watch import errors
from mbcap_watch.doctor import machine
from mbcap_watch.doctor.findings import Finding, Installation, ago, ok, quote, size
from mbcap_watch.doctor.health import judge_age, judge_entries
from mbcap_watch.doctor.machine import Place, place
from mbcap_watch.errors import counted
from mbcap_watch.settings import SNAPSHOT_DIR_NAME
from mbcap_watch.snapshot.files import SNAPSHOT_NAME, cause_of, parse, read_file
from mbcap_watch.snapshot.timestamp import canonical
from mbcap_watch.store import plan
from mbcap_watch.telemetry.stats import seconds_of
from mbcap_watch.watcher.mounts import UNKNOWN, Mount, mount_of
from mbcap_watch.watcher.supervisor import Watch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mbcap_watch.settings import Settings

# For so many seconds, an NFS client believes without asking, by default (nfs(5)).
_CACHED_SECONDS: Final = 60
# Of directories alone: files are seen anew all the same, since their directory is listed first.
_CACHES: Final = ("acdirmin", "acdirmax", "actimeo")

# A directory that is missing, or hidden by a file or a circle of links.
_NOTHING_THERE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def examine(
    here: Installation, settings: Settings, values: dict[str, plan.Value]
) -> Iterator[Finding]:
    """Examine the directory, and read the snapshot as the bridge does. Blocks.

    `values` is filled: by public key, what the snapshot wants written.
    """
    directory = settings.snapshot_dir
    path = directory / SNAPSHOT_NAME
    blocked = machine.blocked_way(here, "snapshot_unreadable", "snapshot dir", path)
    yield blocked or _judge_directory(here, directory)
    if blocked or not place(directory).directory:
        return
    yield from _judge_disk(here)
    yield from machine.cut_off(here)
    try:
        file = read_file(path, settings.max_bytes)
        snapshot = parse(file.data, source=str(path))
    except errors.SnapshotError as exc:
        yield _unusable(here, exc)
        return
    desired = plan.desired_state(snapshot.entries)
    values.update(desired.values)
    unknown, unrecognized = desired.skipped_unknown, desired.skipped_unrecognized
    text = f"valid, {size(len(file.data))}, {counted(desired.entries, 'entry', 'entries')}, "
    text += f"{len(desired.values):,} to be written, {unknown:,} unknown, {unrecognized:,}"
    text += " without a known status or key"
    found = list(judge_entries(here, desired.entries, unknown, unrecognized))
    yield from found or [ok("snapshot", text)]
    placed = time.time() - file.changed_at
    yield judge_stamp(here, snapshot.written_at, placed, time.time())


def _judge_directory(here: Installation, path: Path) -> Finding:
    directory = place(path)
    if directory.directory:
        if directory.readable:
            return ok("snapshot dir", str(path))
        text = f"user {os.geteuid()} may not list {directory.shown}"
        return _refused(here, "snapshot dir", text, directory)
    if directory.error and directory.error.errno not in _NOTHING_THERE:
        text = f"{path} cannot be reached: {directory.error.strerror}"
        return here.finding(cause_of(directory.error), text, subject="snapshot dir")
    if directory.status is None and not path.is_symlink():
        usual = Path(os.path.realpath(here.database)).parent / SNAPSHOT_DIR_NAME
        remedy = f"set --snapshot-dir to the right one; there is {usual}" if usual.is_dir() else ""
        return here.finding("no_snapshot_dir", remedy=remedy)
    if directory.status and path.name == SNAPSHOT_NAME:
        return here.finding("snapshot_dir_is_file")
    text = f"{path} is {'not a directory' if directory.status else 'a link to nothing'}"
    return here.finding("snapshot_misplaced", text, subject="snapshot dir")


def _judge_disk(here: Installation) -> Iterator[Finding]:
    """Judge the disk of the snapshot, where it is not that of the database."""
    path, beside = here.snapshot_dir, os.path.dirname(os.path.realpath(here.database))
    with contextlib.suppress(OSError):
        if not os.path.isdir(beside) or os.stat(path).st_dev != os.stat(beside).st_dev:
            there = here._replace(database=f"{path}/{SNAPSHOT_NAME}")
            yield machine.judge_space(there, os.statvfs(path), "snapshot disk")


def _unusable(here: Installation, error: errors.SnapshotError) -> Finding:
    if isinstance(error, errors.SnapshotNotFound):
        code = "snapshot_misplaced" if error.unusual else "no_snapshot"
        return here.finding(code, error.what, path=error.path)
    if isinstance(error, errors.SnapshotMalformed):
        return here.finding("malformed", f"malformed: {error.what}")
    if isinstance(error, errors.SnapshotUnreadable):
        shut = place(Path(error.path))
        if isinstance(error.__cause__, PermissionError) and shut.status:
            return _refused(here, "snapshot", error.what, shut)
        return here.finding(error.cause or "snapshot_unreadable", error.what)
    return here.finding("refused", f"refused: {error.what}")


def _refused(here: Installation, subject: str, text: str, shut: Place) -> Finding:
    """Return the finding about a place that this user may not read."""
    wanted = os.R_OK | os.X_OK if shut.directory else os.R_OK
    mode = f"as its owner or root: chmod {755 if shut.directory else 644} {quote(shut.path)}"
    remedy = machine.beyond_mode([shut], wanted) or mode
    return here.finding("snapshot_unreadable", text, remedy=remedy, subject=subject)


def judge_stamp(here: Installation, written_at: str | None, placed: float, now: float) -> Finding:
    """Judge how old a snapshot is: by its own word, and by how long ago it was put there."""
    try:
        stamp = seconds_of(None if written_at is None else canonical(written_at))
    except (OverflowError, ValueError):  # the year 0, or an offset out of the calendar
        stamp = None
    text = "no writtenAt" if stamp is None else f"written {ago(now - stamp)} ({written_at})"
    written = placed if stamp is None else now - stamp
    found = next(judge_age(here, written, placed), None)
    return found or ok("age", f"put in place {ago(placed)}, {text}")


def examine_watch(here: Installation, settings: Settings) -> Iterator[Finding]:
    """Watch as `run` does at its start, and undo it; judge that, and the mount. Blocks."""
    with contextlib.closing(Watch(settings, lambda: None)) as watch:
        watch.refresh()
        state = watch.state
    mount = UNKNOWN
    with contextlib.suppress(OSError):
        mount = mount_of(settings.snapshot_dir)
    readable = place(settings.snapshot_dir).readable  # else `snapshot_unreadable` was reported
    if state.mode == "inotify" and not mount.delivers_inotify and mount != UNKNOWN:
        yield here.finding("inotify_blind", type=mount.type, mount_point=mount.mount_point)
    elif readable and state.degraded and mount.delivers_inotify:
        yield here.finding("no_inotify", why=state.why)
    else:
        yield ok("watch", f"{state.mode}: {state.why}")
    yield from judge_options(here, mount)


def judge_options(here: Installation, mount: Mount) -> Iterator[Finding]:
    """Judge the options of a network mount (nfs(5); measured for `nocto`: 47 s late)."""
    where = f"{mount.type} on {mount.mount_point}"
    for option in mount.options if machine.is_remote(mount) else ():
        name, _, seconds = option.partition("=")
        if name == "nocto":
            yield here.finding("nocto", where=where)
        elif name in _CACHES and seconds.isdigit() and int(seconds) > _CACHED_SECONDS:
            yield here.finding("attribute_cache", where=where, option=option)
