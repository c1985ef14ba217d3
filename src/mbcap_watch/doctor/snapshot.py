"""`check`, the snapshot: its directory, the file, its age; and how changes would be noticed."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mbcap_watch.doctor.database import closed_way, is_remote, nearby, place
from mbcap_watch.doctor.findings import Finding, ago, duration, ok, problem, size, warning
from mbcap_watch.doctor.machine import CLOCK_SECONDS
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
from mbcap_watch.watcher.mounts import Mount, mount_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mbcap_watch.results import WatchState
    from mbcap_watch.settings import Settings

# The publisher's cycle takes minutes.
_STALE_SECONDS: Final = 15 * 60.0

# What an NFS client believes without asking for so many seconds, by default (nfs(5)).
_ATTRIBUTE_SECONDS: Final = 60

_PUBLISHER: Final = "is CoreScope's server running, and recent enough to publish (mbcap-snapshot)?"
_CLOCKS: Final = "set the clocks of the publisher, the file server and this machine right (NTP)"


def examine(settings: Settings) -> tuple[list[Finding], dict[str, plan.Value]]:
    """Examine the directory, and read the snapshot as the bridge does. Blocks.

    Returns:
        The findings, and by public key what the snapshot wants written.

    """
    directory = settings.snapshot_dir
    path = directory / SNAPSHOT_NAME
    closed = closed_way("snapshot dir", path)
    finding = closed or _judge_directory(settings)
    if closed or not place(directory).directory:
        return [finding], {}
    try:
        file = read_file(path, settings.max_bytes)
        snapshot = parse(file.data, source=str(path))
    except SnapshotError as exc:
        return [finding, _unusable(exc)], {}
    desired = plan.desired_state(snapshot.entries)
    age = judge_age(snapshot.written_at, file.changed_at, time.time())
    return [finding, judge_entries(desired, len(file.data)), age], desired.values


def _judge_directory(settings: Settings) -> Finding:
    path, subject = settings.snapshot_dir, "snapshot dir"
    directory = place(path)
    if directory.status is None:
        text = f"{path} does not exist{' (it is a link to nothing)' if path.is_symlink() else ''}"
        if others := ", ".join(_others(settings)):
            return warning(subject, text, f"set snapshot_dir to the right one; there is {others}")
        remedy = f"the publisher creates it: {_PUBLISHER} Else set snapshot_dir"
        return warning(subject, text, remedy)
    if not directory.directory:
        remedy = f"set snapshot_dir to the directory that holds {SNAPSHOT_NAME}"
        return problem(subject, f"{path} is not a directory", remedy)
    if not directory.readable:
        text = f"user {os.geteuid()} may not list {directory.shown}"
        return problem(subject, text, f"as its owner or root: chmod 755 {shlex.quote(str(path))}")
    return ok(subject, str(path))


def _others(settings: Settings) -> Iterator[str]:
    """Return directories of this kind near by."""
    real = Path(os.path.realpath(settings.database))
    for directory in dict.fromkeys([real.parent, *nearby(settings.database)]):
        if (directory / SNAPSHOT_DIR_NAME).is_dir():
            yield str(directory / SNAPSHOT_DIR_NAME)


def _unusable(error: SnapshotError) -> Finding:
    text = error.what
    if isinstance(error, SnapshotNotFound):
        level = problem if error.unusual else warning
        return level("snapshot", text, f"nothing was published yet: {_PUBLISHER}")
    if isinstance(error, SnapshotMalformed):
        remedy = "the database stays as it is. A publisher must fill a temporary file and rename it"
        remedy += " over this one, as mbcap-watch publish does; look at its version and its disk"
        return problem("snapshot", f"malformed: {text}", remedy)
    if isinstance(error, SnapshotUnreadable):
        remedy = f"as its owner or root: chmod 644 {shlex.quote(error.path)}; on a network, look at"
        return problem("snapshot", text, f"{remedy} the server's export, on FUSE at allow_other")
    remedy = "remove what is there, the publisher replaces it; or raise max_bytes if it is right"
    return problem("snapshot", f"refused: {text}", f"{remedy} to be so large")


def judge_entries(desired: plan.DesiredState, length: int) -> Finding:
    """Judge what a valid snapshot has to say."""
    text = f"valid, {size(length)}, {desired.entries:,} entries, {len(desired.values):,} to be"
    text += f" written, {desired.skipped_unknown:,} unknown"
    if desired.skipped_unrecognized:
        text += f", {desired.skipped_unrecognized:,} without a known status or key"
    if desired.skipped_unrecognized * 2 > desired.entries:
        remedy = "the publisher writes another format; a status is confirmed, suspected or unknown,"
        return warning("snapshot", text, f"{remedy} in lower case")
    if not desired.values:
        remedy = "right after CoreScope's first start, until it has heard enough; else see its log"
        return warning("snapshot", f"{text}: nothing to write", remedy)
    return ok("snapshot", text)


def judge_age(written_at: str | None, changed_at: float, now: float) -> Finding:
    """Judge how old a snapshot is: by its own word, and by when it was put in place."""
    placed = now - changed_at
    try:
        stamp = seconds_of(None if written_at is None else canonical(written_at))
    except (OverflowError, ValueError):  # the year 0, or an offset out of the calendar
        stamp = None
    written = placed if stamp is None else now - stamp
    text = f"put in place {_ago(placed)}"
    text += ", no writtenAt" if stamp is None else f", written {_ago(written)} ({written_at})"
    if min(placed, written) < -CLOCK_SECONDS:
        return warning("age", text, _CLOCKS)
    if placed > _STALE_SECONDS:
        remedy = f"the publisher has stopped, CoreScope's analytics cycle perhaps: {_PUBLISHER}"
        return warning("age", f"stale: {text}", remedy if written > _STALE_SECONDS else _CLOCKS)
    if written > _STALE_SECONDS:
        remedy = "an old snapshot was put back, or the publisher's clock is behind: see date -u"
        return warning("age", f"stale: {text}", f"{remedy} there, and its log")
    return ok("age", text)


def _ago(seconds: float) -> str:
    return ago(seconds) if seconds >= 0 else f"{duration(-seconds)} in the future"


# ------------------------------------------------------------------------------ the watch


def examine_watch(settings: Settings, state: WatchState) -> list[Finding]:
    """Say how changes will be noticed, `state` being how a watch was armed; judge the mount."""
    try:
        mount = mount_of(settings.snapshot_dir)
    except OSError:
        return [ok("watch", f"{state.mode}: {state.why}")]
    return [judge_watch(settings, state, mount), *judge_options(mount)]


def judge_watch(settings: Settings, state: WatchState, mount: Mount) -> Finding:
    """Judge how changes will be noticed."""
    text = f"{state.mode}: {state.why}"
    if state.mode == "inotify" and not mount.delivers_inotify:
        text += f", but on {mount.type} ({mount.mount_point}) it tells nothing of what others do"
        return problem("watch", text, "set mode to auto or poll")
    allowed = place(settings.snapshot_dir).readable  # else it was said
    if allowed and state.mode == "poll" != settings.mode and mount.delivers_inotify:
        remedy = "raise the limit that was reached: see inotify; or LimitNOFILE= in the unit"
        return warning("watch", text, f"{remedy} (ulimit -n in a shell)")
    return ok("watch", text)


def judge_options(mount: Mount) -> Iterator[Finding]:
    """Judge the options of a network mount (nfs(5); measured for `nocto`: 47 s late)."""
    options = dict(option.partition("=")[::2] for option in mount.options)
    where = f"{mount.type} on {mount.mount_point}"
    if is_remote(mount) and "nocto" in options:
        remedy = "mount it without nocto (in /etc/fstab; then umount and mount)"
        yield problem("mount", f"{where} has nocto: changes are seen up to a minute late", remedy)
    for name in ("acregmin", "acregmax", "acdirmin", "acdirmax", "actimeo"):
        seconds = options.get(name, "")
        if is_remote(mount) and seconds.isdigit() and int(seconds) > _ATTRIBUTE_SECONDS:
            remedy = "mount it with the defaults, or with actimeo=1: changes may be seen late"
            yield warning("mount", f"{where} has {name}={seconds} (seconds)", remedy)
