"""`judge`: whether a bridge is well, and why not. Pure; it decides by data, never by a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import msgspec

from mbcap_watch.doctor.findings import ago, duration
from mbcap_watch.doctor.remedies import remedy
from mbcap_watch.snapshot.files import SNAPSHOT_NAME
from mbcap_watch.telemetry.stats import CONTENDED_SECONDS, SLOW_HOLD_SECONDS
from mbcap_watch.telemetry.statsfile import STALE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mbcap_watch.settings import Settings
    from mbcap_watch.telemetry.discover import Found, Search
    from mbcap_watch.telemetry.stats import Stats

# A look ends within milliseconds, one that changes a million rows on a small machine within
# minutes. A call that hangs is told by the bridge itself (`stuck_since`) after five seconds; what
# is left is a bridge that has ceased to look.
_LOOK_SECONDS: Final = 300.0
_LOOK_INTERVALS: Final = 3

# Likewise for comparisons with the database.
_RESYNCS: Final = 3

# CoreScope's server publishes every few minutes.
_OLD_SNAPSHOT_SECONDS: Final = 3600.0

# Clocks of two machines differ by less.
_CLOCK_SECONDS: Final = 60.0

State = Literal["running", "stuck", "stale", "not running", "unknown"]


class Finding(msgspec.Struct, frozen=True):
    """What is wrong or odd: a name for programs, a sentence for people, and what to do."""

    code: str
    text: str
    remedy: str


class Health(msgspec.Struct, frozen=True):
    """What `judge` found.

    Attributes:
        state: of the process, as far as it can be told.
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


def judge_search(search: Search, settings: Settings, max_age: float | None = None) -> Health:
    """Judge the bridge with these settings by all the stats files there are.

    Args:
        search: what `discover.find` found.
        settings: that it was asked for.
        max_age: see `judge`.

    """
    others = [each for each in search.others if each.stats.fresh]
    if search.found:
        best, *more = search.found
        health = judge(best.stats, best.stats.age, max_age)
        same = [each for each in others if each.stats.database == best.stats.database]
        if health.state == "stale" and best.fate is not None:
            text = f"{health.problems[0].text}, and {_FATES[best.fate]}"
            problem = _finding(best.fate, text, pid=best.stats.pid)
            return msgspec.structs.replace(health, problems=(problem,))
        twins = tuple(_twins(best, more + same)) if best.stats.fresh else ()
        return msgspec.structs.replace(health, problems=twins + health.problems)
    if search.hidden:
        problems = [Finding("not_permitted", each.what, each.remedy) for each in search.hidden]
        return Health("unknown", tuple(problems))
    text = (
        f"no mbcap-watch runs with --database {settings.database}"
        f" --snapshot-dir {settings.snapshot_dir}"
    )
    problems = [_finding("not_running", text)]
    for each in others:
        text = (
            f"process {each.stats.pid} (uid {each.uid}) runs with --database"
            f" {each.stats.database} --snapshot-dir {each.stats.snapshot_dir}"
        )
        problems.append(_finding("other_settings", text))
    problems += [Finding("obstacle", each.what, each.remedy) for each in search.obstacles]
    return Health("not running", tuple(problems))


_FATES: Final = {"gone": "is there no more", "paused": "is paused"}


def _twins(best: Found, candidates: list[Found]) -> Iterator[Finding]:
    # One that was killed just before this one was started is none.
    start = best.stats.age + best.stats.sampled - best.stats.started_at
    names = [
        f"{each.stats.pid} (uid {each.uid}, {each.stats.snapshot_dir})"
        for each in candidates
        if each.stats.fresh and each.stats.age < start
    ]
    if names:
        text = f"more than one mbcap-watch writes this database: process {best.stats.pid} and"
        yield _finding("two_daemons", f"{text} {', '.join(names)}")


def judge(stats: Stats, age: float, max_age: float | None = None) -> Health:
    """Judge what the bridge has told of itself.

    Args:
        stats: the latest.
        age: of them, in seconds; negative if they are from before the machine was started.
        max_age: seconds since the database was last compared that are too many; None: see
            `_RESYNCS`.

    """
    if not 0 <= age <= STALE_SECONDS:
        when = "before the machine was started" if age < 0 else ago(age)
        text = f"process {stats.pid} gave its last sign of life {when}"
        return Health("stale", (_finding("stale", text),))
    stuck = tuple(_stuck(stats))
    trouble = tuple(_trouble(stats))
    overdue = () if stuck or trouble else tuple(_overdue(stats, max_age))
    return Health("stuck" if stuck else "running", stuck + trouble + overdue, tuple(_warn(stats)))


def _stuck(stats: Stats) -> Iterator[Finding]:
    watch, now = stats.watch, stats.sampled
    idle = now - max(watch.last_sync or 0, watch.last_progress or 0, stats.started_at)
    last = f"the last sync was {ago(now - watch.last_sync) if watch.last_sync else 'never'}"
    if watch.stuck_since is not None:
        text = f"alive but stuck: a read or write does not come back; {last}"
        yield _finding("stuck", text, stats)
    elif idle > _LOOK_INTERVALS * stats.sweep_interval + _LOOK_SECONDS:
        text = f"alive but stuck: {last}, and one is due every {duration(stats.sweep_interval)}"
        yield _finding("no_look", text)


def _trouble(stats: Stats) -> Iterator[Finding]:
    """Tell what keeps the database from being as the snapshot says."""
    trouble, result = stats.trouble, stats.last_result
    if result is not None and result.cause == "no_database":
        text = f"there is neither a database at {stats.database} nor a snapshot beside it"
        yield _finding("no_database", text, stats)
    if trouble is None or not trouble.persists:
        return
    code: str = trouble.outcome
    refused = result is not None and result.failed_rows > 0
    if refused and code in ("applied", "unchanged", "failed"):
        code = "rows_refused"
    elif code in ("applied", "unchanged"):
        return  # a table without columns may stay so: a warning
    elif trouble.unreadable:
        code = "snapshot_unreadable"
    elif code == "no_snapshot":
        code = "snapshot_misplaced"
    elif trouble.cause is not None:
        code = trouble.cause
    yield _finding(code, f"for {duration(stats.sampled - trouble.since)}: {trouble.error}", stats)


def _overdue(stats: Stats, max_age: float | None) -> Iterator[Finding]:
    waiting = _waits_for_snapshot(stats)
    limit = max_age
    if limit is None:
        limit = float("inf") if waiting else _RESYNCS * stats.resync + _LOOK_SECONDS
    age = stats.sampled - (stats.last_apply or stats.started_at)
    if age > limit:
        when = ago(age) if stats.last_apply else "never"
        text = f"the database was last compared with a snapshot {when}"
        if waiting:
            yield _finding("no_snapshot", f"{text}: there is none at {_snapshot(stats)}", stats)
        else:
            yield _finding("no_apply", f"{text}; it is due every {duration(stats.resync)} (resync)")


def _warn(stats: Stats) -> Iterator[Finding]:
    lock, trouble = stats.mbcap_persist, stats.trouble
    if stats.watch.last_sync is None:
        yield _finding("first_look", "the first look has not ended yet")
    if _waits_for_snapshot(stats):
        yield _finding("no_snapshot", f"there is no snapshot at {_snapshot(stats)} yet", stats)
    if trouble is not None and trouble.persists and not tuple(_trouble(stats)):
        text = f"not every table can be served: {trouble.error}"
        yield Finding("table_waits", text, remedy("schema_missing"))
    if stats.last_result is not None and stats.last_result.matches_nothing:
        yield _finding("no_match", "not one key of the snapshot is in the database")
    yield from _warn_of_age(stats)
    if stats.watch.degraded:
        yield _finding("no_inotify", f"it polls: {stats.watch.why}", stats)
    if stats.watch.sweep_hits:
        text = f"{stats.watch.sweep_hits} changes came without an event; the sweep found them"
        yield _finding("sweep_hits", text)
    if lock.slow_hold_total:
        text = f"{lock.slow_hold_total} times the write lock was held for over"
        yield _finding("slow_holds", f"{text} {SLOW_HOLD_SECONDS * 1000:g} ms")
    if lock.wait_ms_p95 is not None and lock.wait_ms_p95 > CONTENDED_SECONDS * 1000:
        text = f"5 % of the waits for the write lock take over {lock.wait_ms_p95:g} ms"
        yield _finding("contention", text, stats)


def _warn_of_age(stats: Stats) -> Iterator[Finding]:
    if stats.snapshot_time is not None:
        age = stats.sampled - stats.snapshot_time
        if age > _OLD_SNAPSHOT_SECONDS:
            text = f"the publisher is stale: it wrote the snapshot {ago(age)}"
            yield _finding("old_snapshot", text)
        elif age < -_CLOCK_SECONDS:
            yield _finding("clocks", f"the snapshot was written {duration(-age)} in the future")


def _waits_for_snapshot(stats: Stats) -> bool:
    result = stats.last_result
    return result is not None and result.outcome == "no_snapshot" and result.error is None


def _snapshot(stats: Stats) -> str:
    return f"{stats.snapshot_dir}/{SNAPSHOT_NAME}"


def _finding(code: str, text: str, stats: Stats | None = None, pid: int = 0) -> Finding:
    if stats is None:
        return Finding(code, text, remedy(code, pid=pid))
    return Finding(code, text, remedy(code, stats.database, stats.snapshot_dir))
