"""`check`, the snapshot: its directory, the file, its age; and how changes are noticed."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mbcap_watch.doctor.database import is_remote, judge_space
from mbcap_watch.doctor.findings import Finding, Installation, ago, ok, quote, size
from mbcap_watch.doctor.health import judge_age, judge_entries
from mbcap_watch.doctor.places import Place, beyond_mode, blocked_way, nearby, place
from mbcap_watch.errors import (
    SnapshotError,
    SnapshotMalformed,
    SnapshotNotFound,
    SnapshotUnreadable,
)
from mbcap_watch.settings import SNAPSHOT_DIR_NAME
from mbcap_watch.snapshot.files import SNAPSHOT_NAME, parse, read_file
from mbcap_watch.snapshot.timestamp import canonical
from mbcap_watch.store import plan
from mbcap_watch.telemetry.stats import seconds_of
from mbcap_watch.watcher.mounts import Mount, mount_of, mount_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mbcap_watch.results import WatchState
    from mbcap_watch.settings import Settings

# What an NFS client believes without asking for so many seconds, by default (nfs(5)).
_ATTRIBUTE_SECONDS: Final = 60


def examine(
    installation: Installation, settings: Settings, values: dict[str, plan.Value]
) -> list[Finding]:
    """Examine the directory, and read the snapshot as the bridge does. Blocks.

    Args:
        installation: whose snapshot it is.
        settings: where it is, and how large it may be.
        values: is filled: by public key, what the snapshot wants written.

    """
    path = settings.snapshot_dir / SNAPSHOT_NAME
    subject = "snapshot dir"
    blocked = blocked_way(installation, "snapshot_unreadable", subject, path)
    finding = blocked or _judge_directory(installation, settings.snapshot_dir)
    if blocked or not place(settings.snapshot_dir).directory:
        return [finding]
    findings = [finding, *_judge_disk(installation)]
    real = Path(os.path.realpath(path))
    if any(Path(mount.mount_point) == real for mount in mount_table()):
        findings.append(installation.finding("single_snapshot", path=path))
    try:
        file = read_file(path, settings.max_bytes)
        snapshot = parse(file.data, source=str(path))
    except SnapshotError as exc:
        return [*findings, _unusable(installation, exc)]
    desired = plan.desired_state(snapshot.entries)
    findings += list(_judge_entries(installation, desired, len(file.data)))
    placed = time.time() - file.changed_at
    findings.append(judge_stamp(installation, snapshot.written_at, placed, time.time()))
    values.update(desired.values)
    return findings


def _judge_directory(installation: Installation, path: Path) -> Finding:
    directory = place(path)
    if directory.status is None:
        text = f"{path} does not exist{' (it is a link to nothing)' if path.is_symlink() else ''}"
        others = ", ".join(_others(Path(installation.database)))
        remedy = f"set --snapshot-dir to the right one; there is {others}" if others else ""
        return installation.finding("no_snapshot_dir", text, remedy=remedy)
    if not directory.directory:
        if path.name == SNAPSHOT_NAME:
            return installation.finding("snapshot_dir_is_file")
        text = f"{path} is not a directory"
        return installation.finding("snapshot_misplaced", text, subject="snapshot dir")
    if not directory.readable:
        text = f"user {os.geteuid()} may not list {directory.shown}"
        return _refused(installation, "snapshot dir", text, directory)
    return ok("snapshot dir", str(path))


def _judge_disk(installation: Installation) -> Iterator[Finding]:
    """Judge the disk of the snapshot, where it is not that of the database."""
    path, beside = (
        installation.snapshot_dir,
        os.path.dirname(os.path.realpath(installation.database)),
    )
    with contextlib.suppress(OSError):
        if not os.path.isdir(beside) or os.stat(path).st_dev != os.stat(beside).st_dev:
            there = installation._replace(database=f"{path}/{SNAPSHOT_NAME}")
            yield judge_space(there, os.statvfs(path), "snapshot disk")


def _others(database: Path) -> Iterator[str]:
    """Return directories of this kind near by."""
    real = Path(os.path.realpath(database))
    for directory in dict.fromkeys([real.parent, *nearby(database)]):
        if (directory / SNAPSHOT_DIR_NAME).is_dir():
            yield str(directory / SNAPSHOT_DIR_NAME)


def _unusable(installation: Installation, error: SnapshotError) -> Finding:
    if isinstance(error, SnapshotNotFound):
        code = "snapshot_misplaced" if error.unusual else "no_snapshot"
        return installation.finding(code, error.what, path=error.path)
    if isinstance(error, SnapshotMalformed):
        return installation.finding("malformed", f"malformed: {error.what}")
    if isinstance(error, SnapshotUnreadable):
        shut = place(Path(error.path))
        if isinstance(error.__cause__, PermissionError) and shut.status:
            return _refused(installation, "snapshot", error.what, shut)
        return installation.finding("snapshot_unreadable", error.what)
    return installation.finding("refused", f"refused: {error.what}")


def _refused(installation: Installation, subject: str, text: str, shut: Place) -> Finding:
    """Return the finding about a place that this user may not read."""
    wanted = os.R_OK | os.X_OK if shut.directory else os.R_OK
    mode = f"as its owner or root: chmod {755 if shut.directory else 644} {quote(shut.path)}"
    remedy = beyond_mode([shut], wanted) or mode
    return installation.finding("snapshot_unreadable", text, remedy=remedy, subject=subject)


def _judge_entries(
    installation: Installation, desired: plan.DesiredState, length: int
) -> Iterator[Finding]:
    unknown, unrecognized = desired.skipped_unknown, desired.skipped_unrecognized
    text = f"valid, {size(length)}, {desired.entries:,} entries, {len(desired.values):,} to be"
    text += f" written, {unknown:,} unknown, {unrecognized:,} without a known status or key"
    findings = list(judge_entries(installation, desired.entries, unknown, unrecognized))
    yield from findings or [ok("snapshot", text)]


def judge_stamp(
    installation: Installation, written_at: str | None, placed: float, now: float
) -> Finding:
    """Judge how old a snapshot is: by its own word, and by when it was put in place.

    Args:
        installation: whose snapshot it is.
        written_at: its `writtenAt`.
        placed: seconds since it was put in place.
        now: the time of this machine.

    """
    try:
        stamp = seconds_of(None if written_at is None else canonical(written_at))
    except (OverflowError, ValueError):  # the year 0, or an offset out of the calendar
        stamp = None
    text = "no writtenAt" if stamp is None else f"written {ago(now - stamp)} ({written_at})"
    written = placed if stamp is None else now - stamp
    found = next(judge_age(installation, written, placed), None)
    return found or ok("age", f"put in place {ago(placed)}, {text}")


# ------------------------------------------------------------------------------ the watch


def examine_watch(
    installation: Installation, settings: Settings, state: WatchState
) -> list[Finding]:
    """Say how changes are noticed, `state` being how a watch was armed; judge the mount."""
    try:
        mount = mount_of(settings.snapshot_dir)
    except OSError:
        return [ok("watch", f"{state.mode}: {state.why}")]
    watch = judge_watch(installation, settings, state, mount)
    return [watch, *judge_options(installation, mount)]


def judge_watch(
    installation: Installation, settings: Settings, state: WatchState, mount: Mount
) -> Finding:
    """Judge how changes are noticed."""
    if state.mode == "inotify" and not mount.delivers_inotify:
        about = {"type": mount.type, "mount_point": mount.mount_point}
        return installation.finding("inotify_blind", **about)
    allowed = place(settings.snapshot_dir).readable  # else `snapshot_unreadable` was reported
    if allowed and state.degraded and mount.delivers_inotify:
        remedy = "raise the limit that was reached: see inotify; or LimitNOFILE= in the unit"
        remedy += " (ulimit -n in a shell)"
        return installation.finding("no_inotify", why=state.why, remedy=remedy)
    return ok("watch", f"{state.mode}: {state.why}")


def judge_options(installation: Installation, mount: Mount) -> Iterator[Finding]:
    """Judge the options of a network mount (nfs(5); measured for `nocto`: 47 s late)."""
    options = dict(option.partition("=")[::2] for option in mount.options)
    where = f"{mount.type} on {mount.mount_point}"
    if is_remote(mount) and "nocto" in options:
        yield installation.finding("nocto", where=where)
    for name in ("acregmin", "acregmax", "acdirmin", "acdirmax", "actimeo"):
        seconds = options.get(name, "")
        if is_remote(mount) and seconds.isdigit() and int(seconds) > _ATTRIBUTE_SECONDS:
            about = {"where": where, "option": name, "seconds": seconds}
            yield installation.finding("attribute_cache", **about)
