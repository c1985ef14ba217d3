"""`Metrics`: makes stats of what the hooks are told, in bounded memory.

Pure: nothing is read or written, and the clock is given. It is a monotonic one: an age stays right
when the clock of the machine is set, as it is on a Raspberry Pi some minutes after each start.
"""

from __future__ import annotations

import dataclasses
import math
import time
from array import array
from bisect import bisect_left
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from mbcap_watch.errors import printable
from mbcap_watch.results import PersistResult, Timings, WatchState
from mbcap_watch.snapshot import timestamp
from mbcap_watch.telemetry.stats import (
    BUCKETS,
    CONTENDED_SECONDS,
    HISTORY,
    PARTS_OF_SUMMARY,
    SLOW_HOLD_SECONDS,
    WINDOW,
    HistoryEntry,
    LastError,
    Lock,
    Stats,
    Summary,
    seconds_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mbcap_watch.settings import Settings
    from mbcap_watch.telemetry.stats import Output

# Characters of an error that are kept. It holds a path (4,096 at most) and a sentence.
_ERROR_LENGTH: Final = 5_000

# Which fields are times; within `Metrics` they are our clock's.
_TIMES: Final[dict[type, tuple[str, ...]]] = {
    Stats: ("started_at", "last_apply", "last_result_at", "last_set_back_at", "contended_at"),
    LastError: ("since", "at"),
    HistoryEntry: ("at",),
    WatchState: ("armed_since", "last_sync", "last_progress", "last_sweep_hit", "stuck_since"),
}


class Metrics:
    """Makes stats of what the methods `on_…` are told.

    `outputs` has, by the name of an output, a function that tells how it does now.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        version: str,
        pid: int,
        program: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.outputs: dict[str, Callable[[], Output]] = {}
        self._clock = clock
        self._state = WatchState()  # its times are the bridge's; those of `watch` are ours
        self._lags, self._waits, self._holds = _Durations(), _Durations(), _Durations()
        self._contended = self._slow = 0
        self._history: deque[HistoryEntry] = deque(maxlen=HISTORY)
        self._stats = Stats(
            version=version,
            pid=pid,
            embedded_in=program,
            sampled_at=datetime.now(UTC),
            started_at=clock(),
            database=printable(str(settings.database)),
            snapshot_dir=printable(str(settings.snapshot_dir)),
            poll_interval=settings.poll_interval,
            sweep_interval=settings.sweep_interval,
            resync=settings.resync,
            watch=self._state,
            mbcap_persist=self._lock(),
        )

    def on_result(self, result: PersistResult) -> None:
        """Count a result."""
        now, stats, result = self._clock(), self._stats, _bounded(result)
        news: dict[str, Any] = {
            "last_result": result,
            "last_result_at": now,
            "last_error": _error_after(stats.last_error, result, now),
            "outcomes": stats.outcomes | {result.outcome: stats.outcomes[result.outcome] + 1},
            "reasons": stats.reasons | {result.reason: stats.reasons[result.reason] + 1},
        }
        if result.outcome != "busy":  # that counts its rows, and so does the result that ends it
            for name in ("changed_active", "changed_inactive", "failed_rows", "set_back"):
                news[name] = getattr(stats, name) + getattr(result, name)
            if result.set_back:
                news |= {"last_set_back": result.set_back, "last_set_back_at": now}
        if result.compared:
            news |= {"last_apply": now, "last_apply_outcome": result.outcome}
            news["held"] = result.held
        if result.compared or result.written_at is not None or result.outcome == "no_snapshot":
            news["snapshot_written_at"] = result.written_at
            news["snapshot_time"] = seconds_of(result.written_at)
        self._stats = replace(stats, **news)

        entry = HistoryEntry(
            at=now, reason=result.reason, outcome=result.outcome, changed=result.changed
        )
        if self._history and not entry.changed:
            # A retry every five seconds would push out in minutes what people look for.
            before = self._history[-1]
            if replace(before, at=now, times=1) == entry:
                self._history.pop()
                entry = replace(entry, times=before.times + 1)
        self._history.append(entry)

    def on_state(self, state: WatchState) -> None:
        """Keep how the watch is."""
        before, self._state = self._state, state
        times: dict[str, Any] = {name: getattr(state, name) for name in _TIMES[WatchState]}
        for name, told in times.items():
            if told is not None:
                is_known = told == getattr(before, name)
                times[name] = getattr(self._stats.watch, name) if is_known else self._clock()
        watch = dataclasses.replace(
            state,
            why=_cut(state.why),
            last_problem=state.last_problem and _cut(state.last_problem),
            **times,
        )
        self._stats = replace(self._stats, watch=watch)

    def on_timings(self, timings: Timings) -> None:
        """Count the waits, the holds and the lag of the sync whose result came last."""
        self._waits.extend(timings.waits)
        self._holds.extend(timings.holds)
        if contended := sum(wait > CONTENDED_SECONDS for wait in timings.waits):
            self._contended += contended
            self._stats = replace(self._stats, contended_at=self._clock())
        self._slow += sum(hold > SLOW_HOLD_SECONDS for hold in timings.holds)
        if timings.lag is not None:
            self._lags.extend([timings.lag])
        if self._history:
            self._history[-1] = replace(
                self._history[-1],
                lag_ms=None if timings.lag is None else _milliseconds(timings.lag),
                hold_ms=_milliseconds(max(timings.holds)) if timings.holds else None,
            )

    def snapshot(self, now: float) -> Stats:
        """Return all of it, as of `now` (seconds since the epoch)."""
        offset, stats = now - self._clock(), self._stats

        def wall(timed: Any) -> Any:
            times = {name: getattr(timed, name) for name in _TIMES[type(timed)]}
            known = {name: round(at + offset, 3) for name, at in times.items() if at is not None}
            change = dataclasses.replace if isinstance(timed, WatchState) else replace
            return change(timed, **known)

        timed: Stats = wall(stats)
        return replace(
            timed,
            sampled_at=datetime.fromtimestamp(now, UTC),
            watch=wall(stats.watch),
            last_error=stats.last_error and wall(stats.last_error),
            lag_ms=self._lags.summary(),
            mbcap_persist=self._lock(),
            history=tuple(map(wall, self._history)),
            outputs={name: output() for name, output in self.outputs.items()},
        )

    def _lock(self) -> Lock:
        waits, holds = self._waits.summary(), self._holds.summary()
        return Lock(
            count=waits.count,
            contention_total=self._contended,
            slow_hold_total=self._slow,
            hold_count=holds.count,
            wait_buckets=waits.buckets,
            hold_buckets=holds.buckets,
            **{f"wait_ms_{name}": getattr(waits, name) for name in PARTS_OF_SUMMARY},
            **{f"hold_ms_{name}": getattr(holds, name) for name in PARTS_OF_SUMMARY},
        )


class _Durations:
    """Durations in seconds: how many, how much, and the latest."""

    def __init__(self) -> None:
        self._total = 0.0
        self._latest = array("d")
        self._buckets = [0] * (len(BUCKETS) + 1)

    def extend(self, values: Iterable[float]) -> None:
        for value in values:
            self._total += value
            self._latest.append(value)
            self._buckets[bisect_left(BUCKETS, value)] += 1
        del self._latest[:-WINDOW]

    def summary(self) -> Summary:
        if not self._latest:
            return Summary()
        ordered = sorted(self._latest)
        places = {"p50": 0.50, "p95": 0.95, "p99": 0.99, "max": 1}
        return Summary(
            count=sum(self._buckets),
            total=_milliseconds(self._total),
            buckets=tuple(self._buckets),
            **{
                name: _milliseconds(ordered[math.ceil(part * len(ordered)) - 1])
                for name, part in places.items()
            },
        )


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _error_after(before: LastError | None, result: PersistResult, now: float) -> LastError | None:
    """Return the last error once this result is known."""
    if result.error is None:
        return before and replace(before, persists=False)
    goes_on = before and before.persists and before.outcome == result.outcome
    return LastError(
        outcome=result.outcome,
        error=result.error,
        since=before.since if before and goes_on else now,
        at=now,
        persists=True,
        cause=result.cause,
    )


def _cut(text: str) -> str:
    return printable(text, _ERROR_LENGTH)


def _bounded(result: PersistResult) -> PersistResult:
    """Return `result` without text of any length: a file may hold a time of a million digits."""
    written_at = result.written_at
    if written_at is not None:
        written_at = timestamp.canonical(written_at) if timestamp.is_valid(written_at) else None
    return dataclasses.replace(
        result, written_at=written_at, error=result.error and _cut(result.error)
    )
