"""`judge`: whether a daemon is well, and why not. Pure; it decides by data, never by a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import msgspec

from mbcap_watch.doctor.findings import ago, duration
from mbcap_watch.doctor.remedies import remedy
from mbcap_watch.snapshot.files import SNAPSHOT_NAME
from mbcap_watch.telemetry.stats import CONTENDED_SECONDS, SLOW_HOLD_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mbcap_watch.telemetry.stats import Stats

# A sync ends within milliseconds, one that changes a million rows on a small machine within
# minutes. A call that hangs is told by the bridge itself (`stuck_since`) after five seconds; what
# is left is a bridge that has ceased to sync.
_SYNC_SECONDS: Final = 300.0
_SYNC_INTERVALS: Final = 3

# Likewise for comparisons with the database.
_RESYNCS: Final = 3

# CoreScope's server publishes at least every five minutes.
OLD_SNAPSHOT_SECONDS: Final = 15 * 60.0

# Clocks of two machines differ by less.
_CLOCK_SECONDS: Final = 60.0

State = Literal["starting", "running", "stuck", "paused", "not running", "unknown"]


class Finding(msgspec.Struct, frozen=True):
    """What is wrong or odd: a name for programs, a sentence for people, and what to do."""

    code: str
    text: str
    remedy: str


class Health(msgspec.Struct, frozen=True):
    """How a daemon is.

    Attributes:
        state: of the process, as far as it can be told; `starting` before its first sync.
        problems: each of them makes it unhealthy.
        warnings: worth knowing; no reason to restart anything.

    """

    state: State
    problems: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """The state for people, and whether it is healthy, as far as that is a question."""
        unasked = next((each for each in self.warnings if each.code == "unasked"), None)
        if self.state != "running":
            return self.state
        if unasked is not None:
            return f"running, but cannot be asked: {unasked.text}"
        return "running, healthy" if self.healthy else "running, unhealthy"


def judge(stats: Stats, max_age: float | None = None) -> Health:
    """Judge a daemon by its stats.

    Args:
        stats: made just now.
        max_age: seconds since the database was last compared that are too many; None: see
            `_RESYNCS`.

    """
    stuck, errors = tuple(_stuck(stats)), tuple(_errors(stats))
    if not stuck and stats.watch.last_sync is None:
        up = duration(stats.sampled - stats.started_at)
        starting = finding("starting", f"the first sync has not ended yet; started {up} ago")
        return Health("starting", (starting, *errors), tuple(_warn(stats)))
    overdue = () if stuck or errors else tuple(_overdue(stats, max_age))
    return Health("stuck" if stuck else "running", stuck + errors + overdue, tuple(_warn(stats)))


def _stuck(stats: Stats) -> Iterator[Finding]:
    watch, now = stats.watch, stats.sampled
    idle = now - max(watch.last_sync or 0, watch.last_progress or 0, stats.started_at)
    last = f"the last sync was {ago(now - watch.last_sync) if watch.last_sync else 'never'}"
    if watch.stuck_since is not None:
        text = f"alive but stuck: a read or write does not come back; {last}"
        yield finding("stuck", text, stats)
    elif idle > _SYNC_INTERVALS * stats.sweep_interval + _SYNC_SECONDS:
        text = f"alive but stuck: {last}, and one is due every {duration(stats.sweep_interval)}"
        yield finding("no_sync", text)


def _errors(stats: Stats) -> Iterator[Finding]:
    """Tell what keeps the database from being as the snapshot says."""
    error, result = stats.last_error, stats.last_result
    if result is not None and result.cause == "no_database":
        text = f"there is neither a database at {stats.database} nor a snapshot beside it"
        yield finding("no_database", text, stats)
    if error is None or not error.persists:
        return
    code: str = error.outcome
    refused = result is not None and result.failed_rows > 0
    if refused and code in ("applied", "unchanged", "failed"):
        code = "rows_refused"
    elif code in ("applied", "unchanged"):
        return  # a table without columns may stay so: a warning
    elif error.unreadable:
        code = "snapshot_unreadable"
    elif code == "no_snapshot":
        code = "snapshot_misplaced"
    elif error.cause is not None:
        code = error.cause
    yield finding(code, f"for {duration(stats.sampled - error.since)}: {error.error}", stats)


def _overdue(stats: Stats, max_age: float | None) -> Iterator[Finding]:
    waiting = _waits_for_snapshot(stats)
    limit = max_age
    if limit is None:
        limit = float("inf") if waiting else _RESYNCS * stats.resync + _SYNC_SECONDS
    age = stats.sampled - (stats.last_apply or stats.started_at)
    if age > limit:
        when = ago(age) if stats.last_apply else "never"
        text = f"the database was last compared with a snapshot {when}"
        if waiting:
            yield finding("no_snapshot", f"{text}: there is none at {_snapshot(stats)}", stats)
        else:
            yield finding("no_apply", f"{text}; it is due every {duration(stats.resync)} (resync)")


def _warn(stats: Stats) -> Iterator[Finding]:
    lock, error = stats.mbcap_persist, stats.last_error
    if _waits_for_snapshot(stats):
        yield finding("no_snapshot", f"there is no snapshot at {_snapshot(stats)} yet", stats)
    if error is not None and error.persists and not tuple(_errors(stats)):
        text = f"not every table can be served: {error.error}"
        yield Finding("table_waits", text, remedy("schema_missing"))
    if stats.last_result is not None and stats.last_result.matches_nothing:
        yield finding("no_match", "not one key of the snapshot is in the database")
    yield from _warn_of_age(stats)
    if stats.watch.degraded:
        yield finding("no_inotify", f"it polls: {stats.watch.why}", stats)
    if stats.watch.sweep_hits:
        text = f"{stats.watch.sweep_hits} changes came without an event; the sweep found them"
        yield finding("sweep_hits", text)
    if lock.slow_hold_total:
        text = f"{lock.slow_hold_total} times the write lock was held for over"
        yield finding("slow_holds", f"{text} {SLOW_HOLD_SECONDS * 1000:g} ms")
    if lock.wait_ms_p95 is not None and lock.wait_ms_p95 > CONTENDED_SECONDS * 1000:
        text = f"5 % of the waits for the write lock take over {lock.wait_ms_p95:g} ms"
        yield finding("contention", text, stats)


def _warn_of_age(stats: Stats) -> Iterator[Finding]:
    if stats.snapshot_time is not None:
        age = stats.sampled - stats.snapshot_time
        if age > OLD_SNAPSHOT_SECONDS:
            text = f"the publisher is stale: it wrote the snapshot {ago(age)}"
            yield finding("old_snapshot", text)
        elif age < -_CLOCK_SECONDS:
            yield finding("clocks", f"the snapshot was written {duration(-age)} in the future")


def _waits_for_snapshot(stats: Stats) -> bool:
    result = stats.last_result
    return result is not None and result.outcome == "no_snapshot" and result.error is None


def _snapshot(stats: Stats) -> str:
    return f"{stats.snapshot_dir}/{SNAPSHOT_NAME}"


def finding(code: str, text: str, stats: Stats | None = None, pid: int = 0) -> Finding:
    """Return a finding with its remedy."""
    if stats is None:
        return Finding(code, text, remedy(code, pid=pid))
    return Finding(code, text, remedy(code, stats.database, stats.snapshot_dir))
