"""`Metrics`: counts what the hooks are told, in bounded memory.

Pure: nothing is read or written, and the clock is given. It is a monotonic one: an age stays right
when the clock of the machine is set, as it is on a Raspberry Pi some minutes after each start.
"""

from __future__ import annotations

import dataclasses
import math
import time
from bisect import bisect_left
from collections import Counter, deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol, get_args

import msgspec

from mbcap_watch.errors import printable
from mbcap_watch.results import Outcome, PersistResult, Reason, Timings, WatchState
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


class _HasOutput(Protocol):
    @property
    def output(self) -> Output: ...


class _Durations:
    """Durations in seconds: how many, how much, and the latest."""

    def __init__(self) -> None:
        self._total = 0.0
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self._buckets = [0] * (len(BUCKETS) + 1)

    def extend(self, values: Iterable[float]) -> None:
        for value in values:
            self._total += value
            self._latest.append(value)
            self._buckets[bisect_left(BUCKETS, value)] += 1

    def summary(self) -> Summary:
        if not self._latest:
            return Summary()
        ordered = sorted(self._latest)
        p50, p95, p99, largest = (
            _milliseconds(ordered[math.ceil(part * len(ordered)) - 1])
            for part in (0.50, 0.95, 0.99, 1)
        )
        return Summary(
            count=sum(self._buckets),
            total=_milliseconds(self._total),
            p50=p50,
            p95=p95,
            p99=p99,
            max=largest,
            buckets=tuple(self._buckets),
        )


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


class Metrics:
    """Counts what the hooks of `bridge.run` are told; `on_…` are those hooks.

    Args:
        settings: what the bridge was told.
        version: of this package.
        pid: of the process.
        clock: the time in monotonic seconds.

    Attributes:
        outputs: what is asked, when stats are made, how an output does; by its name.

    """

    def __init__(
        self,
        settings: Settings,
        *,
        version: str,
        pid: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._version, self._pid, self._clock = settings, version, pid, clock
        self.outputs: dict[str, _HasOutput] = {}
        self._started = clock()
        self._state = WatchState()
        # When we were told of the times in the state, by our clock: they are of the wall's.
        self._changed_at: dict[str, float] = {}
        self._result: tuple[PersistResult, float] | None = None
        self._applied: tuple[Outcome, float] | None = None
        self._written_at: str | None = None
        self._last_error: LastError | None = None
        self._outcomes: Counter[Outcome] = Counter()
        self._reasons: Counter[Reason] = Counter()
        self._active = self._inactive = self._failed = self._set_back = 0
        self._last_set_back: tuple[int, float] | None = None
        self._lags, self._waits, self._holds = _Durations(), _Durations(), _Durations()
        self._contended = self._slow = 0
        self._history: deque[HistoryEntry] = deque(maxlen=HISTORY)

    def on_result(self, result: PersistResult) -> None:
        """Count a result."""
        now = self._clock()
        result = _bounded(result)
        self._result = (result, now)
        self._outcomes[result.outcome] += 1
        self._reasons[result.reason] += 1
        if result.outcome != "busy":  # that counts its rows, and so does the result that ends it
            self._active += result.changed_active
            self._inactive += result.changed_inactive
            self._failed += result.failed_rows
            self._set_back += result.set_back
            if result.set_back:
                self._last_set_back = (result.set_back, now)
        compared = result.outcome in ("applied", "unchanged")
        if compared:
            self._applied = (result.outcome, now)
        if compared or result.written_at is not None or result.outcome == "no_snapshot":
            self._written_at = result.written_at
        self._note_error(result, now)
        self._note_history(result, now)

    def _note_history(self, result: PersistResult, now: float) -> None:
        entry = HistoryEntry(
            at=now, reason=result.reason, outcome=result.outcome, changed=result.changed
        )
        if self._history:
            # A retry every five seconds would push out in minutes what people look for.
            before = self._history[-1]
            if msgspec.structs.replace(before, at=now, times=1) == entry and not entry.changed:
                self._history.pop()
                entry = msgspec.structs.replace(entry, times=before.times + 1)
        self._history.append(entry)

    def _note_error(self, result: PersistResult, now: float) -> None:
        before = self._last_error
        if result.error is None:
            if before is not None:
                self._last_error = msgspec.structs.replace(before, persists=False)
            return
        goes_on = before is not None and before.persists and before.outcome == result.outcome
        self._last_error = LastError(
            outcome=result.outcome,
            error=result.error,
            since=before.since if goes_on and before is not None else now,
            at=now,
            persists=True,
            cause=result.cause,
        )

    def on_state(self, state: WatchState) -> None:
        """Keep how the watch is."""
        before, self._state = self._state, state
        for name in _TIMES_OF_STATE:
            if getattr(state, name) != getattr(before, name):
                self._changed_at[name] = self._clock()
        error = self._last_error
        if error is not None and error.outcome == "failed" and error.persists:
            # The state comes after the result of the same sync.
            unreadable = state.read_errors > before.read_errors
            self._last_error = msgspec.structs.replace(
                error, unreadable=error.unreadable or unreadable
            )

    def on_timings(self, timings: Timings) -> None:
        """Count how long a sync kept others and us waiting; its result was told before."""
        self._waits.extend(timings.waits)
        self._holds.extend(timings.holds)
        self._contended += sum(wait > CONTENDED_SECONDS for wait in timings.waits)
        self._slow += sum(hold > SLOW_HOLD_SECONDS for hold in timings.holds)
        if timings.lag is not None:
            self._lags.extend([timings.lag])
        if self._history:
            self._history[-1] = msgspec.structs.replace(
                self._history[-1],
                lag_ms=None if timings.lag is None else _milliseconds(timings.lag),
                hold_ms=_milliseconds(max(timings.holds)) if timings.holds else None,
            )

    def snapshot(self, now: float) -> Stats:
        """Return all of it, as of `now` (seconds since the epoch)."""
        offset = now - self._clock()  # from our clock to that of the wall

        def wall(moment: float) -> float:
            return round(moment + offset, 3)

        result, applied, error = self._result, self._applied, self._last_error
        back = self._last_set_back
        since: dict[str, Any] = {
            name: wall(at)
            for name, at in self._changed_at.items()
            if getattr(self._state, name) is not None
        }
        if error is not None:
            error = msgspec.structs.replace(error, since=wall(error.since), at=wall(error.at))
        settings, state = self._settings, self._state
        return Stats(
            version=self._version,
            pid=self._pid,
            sampled_at=datetime.fromtimestamp(now, UTC),
            started_at=wall(self._started),
            database=printable(str(settings.database)),
            snapshot_dir=printable(str(settings.snapshot_dir)),
            poll_interval=settings.poll_interval,
            sweep_interval=settings.sweep_interval,
            resync=settings.resync,
            watch=dataclasses.replace(
                state,
                why=_cut(state.why),
                last_problem=_cut(state.last_problem) if state.last_problem else None,
                **since,
            ),
            last_apply=wall(applied[1]) if applied else None,
            last_apply_outcome=applied[0] if applied else None,
            snapshot_written_at=self._written_at,
            snapshot_time=seconds_of(self._written_at),
            outcomes={name: self._outcomes[name] for name in get_args(Outcome)},
            reasons={name: self._reasons[name] for name in get_args(Reason)},
            changed_active=self._active,
            changed_inactive=self._inactive,
            failed_rows=self._failed,
            set_back=self._set_back,
            last_set_back=back[0] if back else 0,
            last_set_back_at=wall(back[1]) if back else None,
            last_result=result[0] if result else None,
            last_result_at=wall(result[1]) if result else None,
            last_error=error,
            lag_ms=self._lags.summary(),
            mbcap_persist=self._lock(),
            history=tuple(
                msgspec.structs.replace(each, at=wall(each.at)) for each in self._history
            ),
            outputs={name: each.output for name, each in self.outputs.items()},
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


_TIMES_OF_STATE: Final = (
    "armed_since",
    "last_sync",
    "last_progress",
    "last_sweep_hit",
    "stuck_since",
)


def _cut(text: str) -> str:
    return printable(text, _ERROR_LENGTH)


def _bounded(result: PersistResult) -> PersistResult:
    """Return `result` without text of any length: a file may hold a time of a million digits."""
    written_at = result.written_at
    if written_at is not None:
        written_at = timestamp.canonical(written_at) if timestamp.is_valid(written_at) else None
    error = None if result.error is None else _cut(result.error)
    return dataclasses.replace(result, written_at=written_at, error=error)
