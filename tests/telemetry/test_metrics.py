"""What a bridge has done: counted rightly, in bounded memory, whatever the clocks do."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mbcap_watch import Settings
from mbcap_watch.results import Outcome, Reason, Timings, WatchState
from mbcap_watch.telemetry.metrics import Metrics
from mbcap_watch.telemetry.stats import HISTORY, WINDOW, HistoryEntry, Stats, seconds_of
from support import Clock, result

NOW = 1_800_000_000.0


def make(clock: Clock | None = None) -> Metrics:
    settings = Settings(Path("/data/meshcore.db"))
    return Metrics(settings, version="1.2.3", pid=42, clock=clock or Clock())


def test_a_time_without_a_zone_is_none() -> None:
    """In the zone of this machine, that of the year 1 may be in no year that Python knows."""
    sent = msgspec.json.encode(make().snapshot(NOW))
    assert msgspec.json.decode(sent, type=Stats).sampled == NOW
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(sent.replace(b"00Z", b"00"), type=Stats)


def test_a_bridge_that_has_done_nothing() -> None:
    stats = make().snapshot(NOW)
    assert (stats.version, stats.pid, stats.sampled) == ("1.2.3", 42, NOW)
    assert (stats.database, stats.snapshot_dir) == ("/data/meshcore.db", "/data/mbcap-snapshot")
    assert stats.started_at == NOW
    assert (stats.last_apply, stats.last_result, stats.last_error) == (None, None, None)
    assert (stats.lag_ms.count, stats.lag_ms.max, stats.mbcap_persist.wait_ms_p50) == (
        0,
        None,
        None,
    )
    assert set(stats.outcomes.values()) == {0}


def test_rows_that_were_set_back_are_counted_and_the_last_time_is_kept() -> None:
    clock = Clock()
    metrics = make(clock)
    stats = metrics.snapshot(NOW)
    assert (stats.set_back, stats.last_set_back, stats.last_set_back_at) == (0, 0, None)
    for each in (
        result("busy", "locked", set_back=3),  # the next tells of the same rows
        result("applied", set_back=3),
        result("applied", set_back=2),
    ):
        clock.now += 1
        metrics.on_result(each)
    clock.now += 10
    metrics.on_result(result("unchanged"))
    stats = metrics.snapshot(NOW)
    assert (stats.set_back, stats.last_set_back, stats.last_set_back_at) == (5, 2, NOW - 10)


def test_what_is_held_is_told_as_of_the_last_comparison() -> None:
    metrics = make()
    for each in (result("applied", held=3), result("busy", "locked"), result("malformed", "torn")):
        metrics.on_result(each)
        assert metrics.snapshot(NOW).held == 3
    metrics.on_result(result("unchanged"))
    assert metrics.snapshot(NOW).held == 0


def test_results_are_counted() -> None:
    metrics = make()
    metrics.on_result(result("applied", changed_active=3, changed_inactive=2, failed_rows=1))
    metrics.on_result(result("unchanged", reason="resync"))
    metrics.on_result(result("applied", changed_active=1))
    stats = metrics.snapshot(NOW)
    assert (stats.outcomes["applied"], stats.outcomes["unchanged"]) == (2, 1)
    assert (stats.reasons["rename"], stats.reasons["resync"], stats.reasons["poll"]) == (2, 1, 0)
    assert (stats.changed_active, stats.changed_inactive, stats.failed_rows) == (4, 2, 1)
    assert stats.last_result is not None
    assert stats.last_result.changed_active == 1


def test_rows_written_before_the_database_was_busy_are_counted_once() -> None:
    """Each result of a busy database tells of all the work so far, and so does the last."""
    metrics = make()
    for _ in range(3):
        metrics.on_result(result("busy", "is locked", changed_active=500, failed_rows=1))
    metrics.on_result(result("applied", changed_active=1000, failed_rows=1))
    stats = metrics.snapshot(NOW)
    assert (stats.changed_active, stats.failed_rows) == (1000, 1)


@pytest.mark.parametrize(
    "count, p50, p95, p99, largest",
    [(1, 1, 1, 1, 1), (2, 1, 2, 2, 2), (100, 50, 95, 99, 100), (1000, 500, 950, 990, 1000)],
)
def test_percentiles_are_values_that_were_seen(
    count: int, p50: float, p95: float, p99: float, largest: float
) -> None:
    metrics = make()
    for value in reversed(range(1, count + 1)):
        metrics.on_timings(Timings(lag=value / 1000))
    lag = metrics.snapshot(NOW).lag_ms
    assert (lag.count, lag.p50, lag.p95, lag.p99, lag.max) == (count, p50, p95, p99, largest)


def test_percentiles_are_of_the_latest_and_totals_of_all() -> None:
    metrics = make()
    metrics.on_timings(Timings(lag=9.0))
    for _ in range(WINDOW):
        metrics.on_timings(Timings(lag=0.001))
    lag = metrics.snapshot(NOW).lag_ms
    assert (lag.count, lag.max) == (WINDOW + 1, 1.0)
    assert lag.total == pytest.approx(9000 + WINDOW)


def test_the_lock_as_corescope_shows_it() -> None:
    metrics = make()
    metrics.on_timings(Timings(lag=None, waits=(0.1, 0.101, 2.0), holds=(0.5, 0.501)))
    lock = metrics.snapshot(NOW).mbcap_persist
    assert (lock.count, lock.contention_total, lock.slow_hold_total) == (3, 2, 1)
    assert (lock.wait_ms_p50, lock.wait_ms_max, lock.hold_ms_p50) == (101.0, 2000.0, 500.0)
    names = {"count", "contention_total"}
    for what in ("wait", "hold"):
        names |= {f"{what}_ms_{name}" for name in ("p50", "p95", "p99", "max")}
    assert names <= set(msgspec.to_builtins(lock))
    assert (lock.waits.count, lock.holds.count, lock.holds.max) == (3, 2, 501.0)


def test_the_latest_results_are_kept_with_their_timings() -> None:
    clock = Clock()
    metrics = make(clock)
    for number in range(HISTORY + 1):
        clock.now += 1
        metrics.on_result(result("applied", changed_active=2, changed_inactive=1))
        metrics.on_timings(Timings(lag=number / 1000, holds=(0.001, 0.003, 0.002)))
    history = metrics.snapshot(NOW).history
    assert len(history) == HISTORY
    assert history[-1] == HistoryEntry(
        at=NOW, reason="rename", outcome="applied", changed=3, lag_ms=HISTORY, hold_ms=3.0
    )
    assert history[0].at == NOW - HISTORY + 1


def test_results_alike_that_changed_nothing_take_one_place() -> None:
    clock = Clock()
    metrics = make(clock)

    def tell(outcome: Outcome, reason: Reason, changed: int = 0) -> None:
        clock.now += 5
        metrics.on_result(result(outcome, reason=reason, changed_active=changed))
        if outcome in ("applied", "unchanged"):
            metrics.on_timings(Timings(lag=None))

    tell("malformed", "rename")
    for _ in range(3):
        tell("malformed", "retry")
    for _ in range(2):
        tell("unchanged", "resync")
    for _ in range(2):
        tell("applied", "resync", changed=1)
    history = metrics.snapshot(NOW).history
    assert [(each.outcome, each.reason, each.times, NOW - each.at) for each in history] == [
        ("malformed", "rename", 1, 35),
        ("malformed", "retry", 3, 20),
        ("unchanged", "resync", 2, 10),
        ("applied", "resync", 1, 5),
        ("applied", "resync", 1, 0),
    ]


def test_times_of_results_follow_a_clock_that_is_set() -> None:
    metrics = make()
    metrics.on_result(result("applied"))
    assert metrics.snapshot(5.0).history[0].at == 5.0
    assert metrics.snapshot(NOW).history[0].at == NOW


def test_ages_survive_a_clock_that_is_set() -> None:
    clock = Clock()
    metrics = make(clock)
    metrics.on_result(result("applied"))
    metrics.on_state(WatchState(mode="inotify", armed_since=5.0, last_sync=6.0))  # in 1970
    clock.now += 10
    metrics.on_state(WatchState(mode="inotify", armed_since=5.0, last_sync=6.0, stuck_since=9.0))
    clock.now += 2
    stats = metrics.snapshot(NOW)  # and now the time is known
    assert (stats.started_at, stats.last_apply, stats.watch.last_sync) == (NOW - 12,) * 3
    assert (stats.watch.armed_since, stats.watch.stuck_since) == (NOW - 12, NOW - 2)
    metrics.on_state(WatchState(mode="inotify", sweep_hits=1, last_sweep_hit=7.0))
    assert metrics.snapshot(NOW).watch.last_sweep_hit == NOW


def test_what_the_state_no_longer_has_is_gone() -> None:
    metrics = make()
    metrics.on_state(WatchState(stuck_since=1.0))
    metrics.on_state(WatchState(last_sync=2.0))
    watch = metrics.snapshot(NOW).watch
    assert (watch.stuck_since, watch.last_sync) == (None, NOW)


def test_trouble_begins_lasts_and_ends() -> None:
    clock = Clock()
    metrics = make(clock)
    metrics.on_result(result("busy", "/db: locked"))
    clock.now += 5
    metrics.on_result(result("busy", "/db: still locked"))
    error = metrics.snapshot(NOW).last_error
    assert error is not None
    assert (error.outcome, error.error, error.persists) == ("busy", "/db: still locked", True)
    assert (error.since, error.at) == (NOW - 5, NOW)
    clock.now += 1
    metrics.on_result(result("unchanged"))
    error = metrics.snapshot(NOW).last_error
    assert error is not None
    assert (error.persists, error.error) == (False, "/db: still locked")
    metrics.on_result(result("busy", "/db: locked again"))
    error = metrics.snapshot(NOW).last_error
    assert error is not None
    assert error.since == NOW


def test_the_snapshot_that_was_read_last_is_remembered() -> None:
    metrics = make()

    def after(outcome: Outcome, written_at: str | None) -> str | None:
        metrics.on_result(result(outcome, written_at=written_at))
        return metrics.snapshot(NOW).snapshot_written_at

    assert after("applied", "2026-07-18T08:47:37Z") == "2026-07-18T08:47:37Z"
    assert after("malformed", None) == "2026-07-18T08:47:37Z"
    assert after("busy", "2026-07-18T09:00:00Z") == "2026-07-18T09:00:00Z"
    assert after("no_snapshot", None) is None


@pytest.mark.parametrize(
    "written_at, seconds",
    [
        (None, None),
        ("0001-01-01T00:00:00Z", None),
        ("0000-02-29T00:00:00Z", None),
        ("0001-01-01T00:00:00+23:59", -62135683140.0),
        ("9999-12-31T23:59:59.999999999-23:59", 253402387139.999999),
        ("1970-01-01T00:01:00.5Z", 60.5),
        ("1970-01-01T02:00:00.123456789+02:00", 0.123456),
    ],
)
def test_the_time_of_a_snapshot(written_at: str | None, seconds: float | None) -> None:
    assert seconds_of(written_at) == pytest.approx(seconds)


def test_memory_is_bounded() -> None:
    metrics = make()
    text, digits = "x" * 100_000, "1" * 100_000
    long: dict[str, Any] = {"written_at": f"2026-01-01T00:00:00.{digits}Z"}

    def work(times: int) -> None:
        for _ in range(times):
            metrics.on_result(result("failed", text, changed_active=1, **long))
            metrics.on_state(WatchState(why=text, last_problem=text))
            metrics.on_timings(Timings(lag=0.1, waits=(0.1,) * 100, holds=(0.1,) * 100))

    work(HISTORY + WINDOW)
    tracemalloc.start()
    work(500)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # What was replaced was not traced when it was made, so its successors count as growth.
    assert grown < 400_000
    assert len(msgspec.json.encode(metrics.snapshot(NOW))) < 50_000


def test_stats_are_json_and_back() -> None:
    metrics = make()
    metrics.on_result(result("failed", "a \udcff path"))
    metrics.on_state(WatchState(mode="inotify", why="\udcff", last_sync=1.0))
    metrics.on_timings(Timings(lag=0.1, waits=(0.1,), holds=(0.1,)))
    stats = metrics.snapshot(NOW)
    data = msgspec.json.encode(stats)
    assert b'"sampledAt":"2027-01-15T08:00:00Z"' in data
    assert msgspec.json.decode(data, type=Stats).mbcap_persist == stats.mbcap_persist
