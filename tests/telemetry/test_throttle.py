"""No flood, nothing forgotten: which lines are logged when a state flaps, told the time."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mbcap_watch.results import PersistResult, WatchState
from mbcap_watch.telemetry.logs import MOST, REMINDER, WINDOW, StateLog, Throttle, _JsonFormatter
from support import Clock, result, result_log

if TYPE_CHECKING:
    import pytest

HOUR, DAY = 3600, 86_400
APPLIED = result("applied", changed_active=1, matched_active=1, entries=1)
UNCHANGED = result("unchanged", reason="resync", matched_active=1, entries=1)
BUSY = result("busy", "/db: locked", reason="retry")


def log_over_time(
    caplog: pytest.LogCaptureFixture, log: Any, clock: Clock, timeline: list[tuple[float, Any]]
) -> list[str]:
    """Give each thing to the log at its time; return the lines."""
    with caplog.at_level(logging.INFO, logger="mbcap_watch"):
        for clock.now, each in timeline:
            log(each)
    return [record.getMessage() for record in caplog.records]


def results(
    caplog: pytest.LogCaptureFixture, timeline: list[tuple[float, PersistResult]]
) -> list[str]:
    """Return the lines, without those of applied snapshots, and without remedies."""
    clock = Clock()
    lines = log_over_time(caplog, result_log(clock), clock, timeline)
    return [line.partition("; ")[0] for line in lines if not line.startswith("applied: ")]


def torn(number: int) -> PersistResult:
    return result("malformed", f"/x: truncated at {number}", reason="retry")


def test_what_flaps_is_counted_and_every_applied_snapshot_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    flapping = [(float(t), BUSY if t % 2 else APPLIED) for t in range(100)]
    lines = results(caplog, [*flapping, (400.0, UNCHANGED)])
    assert lines == ["busy: /db: locked"] * MOST + ["busy: 45 more in the last 5 min"]
    assert sum(record.getMessage().startswith("applied: ") for record in caplog.records) == 50


def test_hours_of_flapping_are_no_flood(caplog: pytest.LogCaptureFixture) -> None:
    lines = results(caplog, [(float(t), BUSY if t % 2 else UNCHANGED) for t in range(4 * HOUR)])
    assert len(lines) <= 2 * (MOST + 1) * 4 * HOUR / WINDOW
    counts = [
        int(line.split()[1]) for line in lines if line.startswith("busy: ") and "more" in line
    ]
    assert sum(counts) + lines.count("busy: /db: locked") > 2 * HOUR * 0.97  # the last is to come


def test_texts_that_change_each_time_are_one_kind(caplog: pytest.LogCaptureFixture) -> None:
    lines = results(caplog, [(t / 10, torn(t)) for t in range(1000)])
    assert lines == [f"malformed: /x: truncated at {n}" for n in range(MOST)]


def test_trouble_of_another_kind_is_not_suppressed(caplog: pytest.LogCaptureFixture) -> None:
    lines = results(caplog, [*[(t / 10, torn(t)) for t in range(1000)], (101.0, BUSY)])
    assert lines[-1] == "busy: /db: locked"


def test_the_last_word_is_the_truth(caplog: pytest.LogCaptureFixture) -> None:
    """A state that was held back is said when its turn comes, though nothing changes any more."""
    flapping = [(float(t), UNCHANGED if t % 2 else BUSY) for t in range(21)]
    lines = results(caplog, [*flapping, (200.0, BUSY), (400.0, BUSY), (500.0, BUSY)])
    assert lines[-2:] == ["busy: 6 more in the last 5 min", "busy: /db: locked"]


def test_trouble_that_lasts_is_said_every_hour(caplog: pytest.LogCaptureFixture) -> None:
    lines = results(caplog, [(float(t), BUSY) for t in range(0, DAY, 30)])
    assert lines == ["busy: /db: locked"] * (DAY // int(REMINDER))


def test_what_is_well_is_not_repeated(caplog: pytest.LogCaptureFixture) -> None:
    lines = results(caplog, [(float(t), UNCHANGED) for t in range(0, DAY, 30)])
    assert [line.partition(":")[0] for line in lines] == ["unchanged"]


def test_the_count_is_there_for_machines(caplog: pytest.LogCaptureFixture) -> None:
    results(caplog, [*[(t / 10, torn(t)) for t in range(20)], (400.0, torn(19))])
    (record,) = [r for r in caplog.records if " more in " in r.getMessage()]
    fields = json.loads(_JsonFormatter().format(record))
    assert fields.items() >= {"kind": "malformed", "suppressed": 15, "seconds": 300.0}.items()


def test_the_end_leaves_no_count_unsaid(caplog: pytest.LogCaptureFixture) -> None:
    log = result_log(lambda: 0.0)
    for number in range(8):
        log(torn(number))
    log.end()
    assert caplog.records[-1].getMessage() == "malformed: 3 more in the last 5 min"


# ------------------------------------------------------------------------------ the watch


def test_a_watch_that_is_armed_again_and_again_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    clock, state = Clock(), WatchState(mode="inotify", why="ext4", last_problem="moved")
    timeline = [(float(t), replace(state, rearms=t)) for t in range(21)]
    lines = log_over_time(
        caplog, StateLog(clock), clock, [*timeline, (305.0, timeline[-1][1]), (310.0, state)]
    )
    again = "watching by inotify: ext4 (armed anew: moved)"
    assert lines[:MOST] == ["watching by inotify: ext4", *[again] * (MOST - 1)]
    assert lines[MOST : MOST + 2] == ["watching: 16 more in the last 5 min", again]


def test_every_change_that_the_watch_misses_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    clock, start = Clock(), WatchState()
    timeline = [(float(t), replace(start, sweep_hits=t)) for t in range(60)]
    lines = log_over_time(caplog, StateLog(clock), clock, [*timeline, (999.0, timeline[-1][1])])
    missed = "the sweep found a change that no event told of"
    assert lines == [missed] * MOST + ["sweep: 54 more in the last 5 min", missed]


def test_a_mount_that_stays_silent_is_said_every_hour(caplog: pytest.LogCaptureFixture) -> None:
    clock, stuck = Clock(), WatchState(stuck_since=1.0)
    timeline: list[tuple[float, Any]] = [(float(t), stuck) for t in range(0, 3 * HOUR, 5)]
    lines = log_over_time(caplog, StateLog(clock), clock, [*timeline, (3.0 * HOUR, WatchState())])
    assert lines == [
        *["the filesystem does not answer; waiting for it"] * 3,
        "the filesystem answers again",
    ]


def test_a_reminder_starts_anew_with_each_state() -> None:
    throttle = Throttle(calm=None, remind_after=10.0)
    assert throttle.is_news("a", "kind", 0.0)
    assert throttle.is_news("b", "kind", 9.0)
    assert not throttle.is_news("b", "kind", 18.0)
    assert throttle.is_news("b", "kind", 19.0)
