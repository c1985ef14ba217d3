"""`judge`: whether a daemon is well, and why not. Pure; it decides by data, never by a text."""

from __future__ import annotations

import os.path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from mbcap_watch.doctor.findings import Finding, Installation, ago, duration
from mbcap_watch.errors import counted
from mbcap_watch.snapshot.files import SNAPSHOT_NAME
from mbcap_watch.telemetry.stats import CONTENDED_SECONDS, SLOW_HOLD_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mbcap_watch.results import Outcome, PersistResult
    from mbcap_watch.telemetry.stats import Stats

# A sync ends within milliseconds, one that changes a million rows on a small machine within
# minutes. A call that hangs is reported by the bridge itself (`stuck_since`) after five seconds.
_SYNC_SECONDS: Final = 300.0

# So many intervals may pass besides: sweeps without a sync, resyncs without a comparison.
_INTERVALS: Final = 3

# CoreScope's server publishes at least every five minutes.
OLD_SNAPSHOT_SECONDS: Final = 15 * 60.0

# The clocks of two machines differ by less.
CLOCK_SECONDS: Final = 60.0

# Outcomes of a sync that found a snapshot.
_FOUND: Final[tuple[Outcome, ...]] = ("applied", "unchanged", "malformed", "refused", "busy")

# For how long something that is over is still told.
_LATELY_SECONDS: Final = 3600.0

# With these there may be no directory to watch. Then `no_inotify` would say nothing new.
_NO_DIRECTORY: Final = frozenset(
    ("snapshot_misplaced", "snapshot_dir_is_file", "snapshot_unreadable", "filesystem_failed")
)

# The findings about the daemon's outputs.
_OUTPUTS: Final = {"log": "log_unread", "ack": "ack_failed", "http": "http_down"}

State = Literal["starting", "running", "stuck", "paused", "not running", "unknown"]

# With the first finding of these, the process is in another state than `running`.
STATES: Final[dict[str, State]] = {
    "starting": "starting",
    **dict.fromkeys(("stuck", "no_sync", "blocked"), "stuck"),
    "paused": "paused",
    **dict.fromkeys(("not_running", "gone"), "not running"),
    **dict.fromkeys(("no_proc", "hidden", "not_asked", "not_trusted", "not_understood"), "unknown"),
}


class Health(msgspec.Struct, frozen=True):
    """The verdict on a daemon, by all that was found."""

    findings: tuple[Finding, ...] = ()

    @property
    def state(self) -> State:
        """The state of the process, as far as it is known."""
        known = (STATES[each.code] for each in self.findings if each.code in STATES)
        return next(known, "running")

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What makes it unhealthy."""
        return tuple(each for each in self.findings if each.severity == "problem")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What is worth knowing; no reason to restart anything."""
        return tuple(each for each in self.findings if each.severity == "warning")

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """The state for people; of a process that runs, also whether it is healthy."""
        if self.state != "running":
            return self.state
        if unasked := [each.text for each in self.warnings if each.code == "unasked"]:
            return f"running, but cannot be asked: {unasked[0]}"
        return "running, healthy" if self.healthy else "running, unhealthy"


def judge(stats: Stats, max_age: float | None = None, here: Installation | None = None) -> Health:
    """Judge a daemon by stats that were made just now.

    It is unhealthy if the last comparison is more than `max_age` seconds ago; without one, after
    `_INTERVALS`. `here` is what the findings are about, if more is known than the stats say.
    """
    here = here or Installation(stats.database, stats.snapshot_dir)
    findings = [*_of_process(stats, here), *_about_result(stats, here)]
    if not any(each.severity == "problem" for each in findings):
        findings += _overdue(stats, here, max_age)
    if stats.snapshot_time is not None:
        findings += judge_age(here, stats.sampled - stats.snapshot_time)
    if stats.watch.degraded and not _NO_DIRECTORY.intersection(each.code for each in findings):
        findings.append(here.finding("no_inotify", why=stats.watch.why))
    return Health((*findings, *_of_late(stats, here), *_about_outputs(stats, here)))


def _of_process(stats: Stats, here: Installation) -> Iterator[Finding]:
    watch, now = stats.watch, stats.sampled
    idle = now - max(watch.last_sync or 0, watch.last_progress or 0, stats.started_at)
    last = "no sync has ended yet"
    if watch.last_sync:
        last = f"the last sync ended {ago(now - watch.last_sync)}"
    if watch.stuck_since is not None:
        yield here.finding("stuck", last=last)
    elif idle > _INTERVALS * stats.sweep_interval + _SYNC_SECONDS:
        yield here.finding("no_sync", last=last, interval=duration(stats.sweep_interval))
    elif watch.last_sync is None:
        yield here.finding("starting", pid=stats.pid, when=ago(now - stats.started_at))


def _about_result(stats: Stats, here: Installation) -> Iterator[Finding]:
    result, error = stats.last_result, stats.last_error
    if result is None:
        return
    since = f"for {duration(stats.sampled - error.since)}: " if error and error.persists else ""
    for each in _explained(result, here, since):
        if each.code == "no_snapshot" and any(stats.outcomes[name] for name in _FOUND):
            path = f"{stats.snapshot_dir}/{SNAPSHOT_NAME}"
            yield here.finding("snapshot_vanished", path=path)
        else:
            yield each


def explain(result: PersistResult, here: Installation) -> Finding | None:
    """Return what a sync found wrong, the worst of it; None if all is well."""
    found = list(_explained(result, here))
    if result.set_back:
        found.append(_set_back(here, result.set_back))
    problems = (each for each in found if each.severity == "problem")
    return next(problems, next(iter(found), None))


def _explained(result: PersistResult, here: Installation, since: str = "") -> Iterator[Finding]:
    """Make findings of a result; `since` says for how long its error has been there."""
    outcome, error, text = result.outcome, result.error, ""
    if error is not None:
        text = f"{since}{error}"
    if result.failed_rows and (result.compared or outcome == "failed"):
        yield here.finding("rows_refused", text)
    elif result.cause is not None:
        yield here.finding(result.cause, text)
    elif result.compared and error is not None:
        yield here.finding("table_waits", waiting=error)
    elif outcome == "no_snapshot" and error is not None:
        itself = os.path.basename(here.snapshot_dir) == SNAPSHOT_NAME
        yield here.finding("snapshot_dir_is_file" if itself else "snapshot_misplaced", text)
    elif outcome != "no_snapshot" and not result.compared:
        yield here.finding(outcome, text)
    if outcome == "no_snapshot" and error is None:
        yield here.finding("no_snapshot", path=f"{here.snapshot_dir}/{SNAPSHOT_NAME}")
    if result.compared:
        yield from judge_entries(
            here, result.entries, result.skipped_unknown, result.skipped_unrecognized
        )
        if result.matches_nothing and result.cause is None:
            yield here.finding("no_match")


def _set_back(here: Installation, count: int, when: str = "") -> Finding:
    rows = counted(count, "row was", "rows were")
    return here.finding("set_back", rows=rows, when=when)


def _overdue(stats: Stats, here: Installation, max_age: float | None) -> Iterator[Finding]:
    result, limit = stats.last_result, max_age
    if limit is None:
        waits = result is not None and result.outcome == "no_snapshot" and result.error is None
        limit = float("inf") if waits else _INTERVALS * stats.resync + _SYNC_SECONDS
    age = stats.sampled - (stats.last_apply or stats.started_at)
    if age > limit:
        never = "" if stats.last_apply else "the database has never been compared with a snapshot"
        yield here.finding("no_apply", never, when=ago(age), interval=duration(stats.resync))


def judge_entries(
    here: Installation, entries: int, unknown: int, unrecognized: int
) -> Iterator[Finding]:
    """Judge the entries of a valid snapshot."""
    said = {"entries": counted(entries, "entry", "entries"), "unrecognized": f"{unrecognized:,}"}
    if unrecognized and unknown + unrecognized == entries:
        yield here.finding("no_usable_entry", **said)
    elif unrecognized * 2 > entries:
        yield here.finding("unrecognized", **said)
    elif unknown == entries:
        yield here.finding("nothing_to_write", **said)


def judge_age(here: Installation, written: float, placed: float | None = None) -> Iterator[Finding]:
    """Judge how many seconds ago a snapshot was written, and put in place (None: not known)."""
    known = written if placed is None else placed
    said = {"when": ago(written), "placed": ago(known)}
    if min(written, known) < -CLOCK_SECONDS or written < OLD_SNAPSHOT_SECONDS < known:
        text = "" if placed is not None else f"clocks differ: the snapshot is dated {ago(written)}"
        yield here.finding("clocks", text, **said)
    elif known > OLD_SNAPSHOT_SECONDS:
        yield here.finding("old_snapshot", **said)
    elif written > OLD_SNAPSHOT_SECONDS:
        yield here.finding("old_snapshot_again", **said)


def _of_late(stats: Stats, here: Installation) -> Iterator[Finding]:
    """Judge how it went lately; what was over an hour ago is of no use to anybody."""
    watch, wait = stats.watch, (stats.mbcap_persist.wait_ms_p95 or 0) / 1000

    def since(moment: float | None) -> float:
        return float("inf") if moment is None else stats.sampled - moment

    if (age := since(watch.last_sweep_hit)) < _LATELY_SECONDS:
        changes = counted(watch.sweep_hits, "change was", "changes were")
        yield here.finding("sweep_hits", changes=changes, when=ago(age))
    if (age := since(stats.last_set_back_at)) < _LATELY_SECONDS:
        yield _set_back(here, stats.last_set_back, f", {ago(age)}")
    late = [each for each in stats.history if since(each.at) < _LATELY_SECONDS]
    if slow := sum((each.hold_ms or 0) > SLOW_HOLD_SECONDS * 1000 for each in late):
        times = counted(slow, "time", "times")
        yield here.finding("slow_holds", seconds=duration(SLOW_HOLD_SECONDS), times=times)
    if since(stats.contended_at) < _LATELY_SECONDS and wait > CONTENDED_SECONDS:
        yield here.finding("contention", wait=duration(wait))


def _about_outputs(stats: Stats, here: Installation) -> Iterator[Finding]:
    for name, output in stats.outputs.items():
        if output.problem is not None and name in _OUTPUTS:
            last = "it has never worked"
            if output.last_good is not None:
                last = f"it last worked {ago(stats.sampled - output.last_good)}"
            yield here.finding(_OUTPUTS[name], problem=output.problem, last=last)
