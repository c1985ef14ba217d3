"""When the bridge syncs next: a clock that only the test moves.

All times are multiples of 1/64 s, which binary fractions hold exactly, so that "at once" and
"not before" can be asserted without a tolerance.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbcap_watch.settings import Settings
from mbcap_watch.watcher.scheduler import Scheduler

if TYPE_CHECKING:
    from mbcap_watch.results import Reason

START = 1000.0
DEBOUNCE = 0.125
MAX_WAIT = 1.0
TICK = 1 / 64


def scheduler(**changes: Any) -> Scheduler:
    """Make a scheduler that nothing but the test disturbs, unless it asks for that."""
    quiet: dict[str, Any] = {"sweep_interval": 100_000, "poll_interval": 100_000, "resync": 200_000}
    times = {"debounce": DEBOUNCE, "max_wait": MAX_WAIT}
    return Scheduler(Settings.from_mapping({"database": "x"} | quiet | times | changes), START)


def sync(plan: Scheduler, reason: Reason, at: float, *, seconds: float = 0, **end: Any) -> None:
    """Serve one sync that takes `seconds`."""
    plan.begin(reason, at)
    plan.end(at + seconds, **({"idle": False, "compared": True, "retry_in": None} | end))


# ------------------------------------------------------------------------------ renames


def test_a_lone_rename_is_served_at_once() -> None:
    plan = scheduler()
    plan.notify(START + 3)
    assert plan.next(polling=False) == (START + 3, "rename")
    sync(plan, "rename", START + 3)
    assert plan.next(polling=False)[1] != "rename"


def test_pending_tells_whether_a_rename_waits() -> None:
    plan = scheduler()
    told = [plan.pending]
    plan.notify(START)
    told.append(plan.pending)
    plan.begin("poll", START + 1)  # any sync serves a rename
    told.append(plan.pending)
    plan.notify(START + 2)
    plan.end(START + 3, idle=False, compared=True, retry_in=None)
    told.append(plan.pending)
    assert told == [False, True, False, True]


def test_a_rename_long_after_the_last_sync_is_served_at_once() -> None:
    plan = scheduler()
    sync(plan, "start", START)
    plan.notify(START + DEBOUNCE)
    assert plan.next(polling=False) == (START + DEBOUNCE, "rename")


def test_more_renames_before_the_first_is_served_do_not_postpone_it() -> None:
    plan = scheduler()
    for number in range(5):
        plan.notify(START + number * TICK)
    assert plan.next(polling=False) == (START, "rename")


def test_renames_soon_after_a_sync_merge_into_one_that_waits_for_quiet() -> None:
    plan = scheduler()
    sync(plan, "rename", START)
    for number in range(1, 5):
        plan.notify(START + number * TICK)
        assert plan.next(polling=False) == (START + number * TICK + DEBOUNCE, "rename")
    sync(plan, "rename", START + 4 * TICK + DEBOUNCE)
    assert not plan.pending


def test_a_rename_during_a_sync_wants_another_one() -> None:
    plan = scheduler()
    plan.notify(START)
    plan.begin("rename", START)
    plan.notify(START + 1)
    plan.end(START + 1 + TICK, idle=False, compared=True, retry_in=None)
    assert plan.next(polling=False) == (START + 1 + DEBOUNCE, "rename")


def test_a_rename_early_in_a_long_sync_is_due_when_it_ends() -> None:
    plan = scheduler()
    plan.begin("rename", START)
    plan.notify(START + 1)
    plan.end(START + 5, idle=False, compared=True, retry_in=None)
    assert plan.next(polling=False)[0] <= START + 5


def test_an_unending_burst_cannot_postpone_a_sync_beyond_max_wait() -> None:
    plan = scheduler()
    sync(plan, "rename", START)
    first = START + TICK
    for number in range(1, 1000):
        now = START + number * TICK
        due, _ = plan.next(polling=False)
        if due <= now:
            break
        plan.notify(now)
    assert plan.next(polling=False) == (first + MAX_WAIT, "rename")


def test_without_debounce_every_rename_is_served_at_once() -> None:
    plan = scheduler(debounce=0)
    sync(plan, "rename", START, seconds=TICK)
    plan.notify(START + TICK)
    assert plan.next(polling=False) == (START + TICK, "rename")


def serve(
    plan: Scheduler, renames: list[float], durations: list[float]
) -> tuple[list[float], list[tuple[float, float]]]:
    """Play `renames` to `plan`, as the service would; return them and the syncs (begin, end)."""
    syncs: list[tuple[float, float]] = []
    waiting = sorted(renames)
    free = START
    while waiting or plan.pending:
        due = max(plan.next(polling=False)[0], free) if plan.pending else math.inf
        if waiting and waiting[0] <= due:
            plan.notify(waiting.pop(0))
            continue
        seconds = durations[len(syncs) % len(durations)]
        plan.begin("rename", due)
        free = due + seconds
        while waiting and waiting[0] <= free:
            plan.notify(waiting.pop(0))
        plan.end(free, idle=False, compared=True, retry_in=None)
        syncs.append((due, free))
    return sorted(renames), syncs


ticks = st.integers(0, 6 * 64).map(lambda number: START + number * TICK)
lengths = st.sampled_from([0.0, TICK, DEBOUNCE, 0.5, 3.0])


@given(st.lists(ticks, max_size=60), st.lists(lengths, min_size=1, max_size=4))
def test_every_rename_is_followed_by_a_sync_in_time(
    renames: list[float], durations: list[float]
) -> None:
    renames, syncs = serve(scheduler(), renames, durations)
    for rename in renames:
        # A sync that begins at the very moment of the rename reads what it announced.
        begin = next(begin for begin, _ in syncs if begin >= rename)
        busy_until = next((end for start, end in syncs if start < rename <= end), rename)
        assert begin <= max(rename + MAX_WAIT, busy_until)
    if renames:  # the last state does not even wait that long
        busy_until = next((end for start, end in syncs if start < renames[-1] <= end), renames[-1])
        assert syncs[-1][0] <= max(renames[-1] + DEBOUNCE, busy_until)


@given(st.lists(ticks, max_size=60), st.lists(lengths, min_size=1, max_size=4))
def test_the_number_of_syncs_is_bounded(renames: list[float], durations: list[float]) -> None:
    renames, syncs = serve(scheduler(), renames, durations)
    assert len(syncs) <= len(renames)
    begins = [begin for begin, _ in syncs]
    assert all(after - before >= DEBOUNCE for before, after in itertools.pairwise(begins))


@given(st.lists(ticks, min_size=1, max_size=20))
def test_no_sync_without_a_rename(renames: list[float]) -> None:
    renames, syncs = serve(scheduler(), renames, [TICK])
    before = -math.inf
    for begin, _ in syncs:
        assert any(before < rename <= begin for rename in renames)
        before = begin


# ------------------------------------------------------------------------------ poll, sweep


@pytest.mark.parametrize("reason, polling", [("poll", True), ("sweep", False)])
def test_the_pace_is_steady_even_when_syncs_are_late(reason: Reason, polling: bool) -> None:
    plan = scheduler(**{f"{reason}_interval": 1})
    at = plan.next(polling=polling)[0]
    assert plan.next(polling=polling) == (at, reason)
    for late in (0, TICK, 0.5, 1 - TICK):
        sync(plan, reason, at + late, compared=False)
        at += 1
        assert plan.next(polling=polling) == (at, reason)


@pytest.mark.parametrize("reason, polling", [("poll", True), ("sweep", False)])
def test_missed_beats_are_skipped_not_made_up_for(reason: Reason, polling: bool) -> None:
    plan = scheduler(**{f"{reason}_interval": 2})
    at = plan.next(polling=polling)[0]
    sync(plan, reason, at + 7.25, compared=False)
    assert plan.next(polling=polling) == (at + 8, reason)


def test_the_first_poll_is_at_once_the_first_sweep_is_not() -> None:
    plan = scheduler(poll_interval=1, sweep_interval=5)
    assert plan.next(polling=True) == (START, "poll")
    assert plan.next(polling=False) == (START + 5, "sweep")


def test_there_are_sweeps_between_polls() -> None:
    plan = scheduler(poll_interval=2, sweep_interval=5)
    served: list[tuple[float, Reason]] = []
    while len(served) < 6:
        served.append(plan.next(polling=True))
        sync(plan, served[-1][1], served[-1][0], compared=False)
    assert [(at - START, reason) for at, reason in served] == [
        (0, "poll"),
        (2, "poll"),
        (4, "poll"),
        (5, "sweep"),
        (6, "poll"),
        (8, "poll"),
    ]


def test_polling_that_sets_in_later_begins_at_once_and_keeps_pace() -> None:
    plan = scheduler(poll_interval=1)
    at, reason = plan.next(polling=True)
    assert (at <= START + 50.5, reason) == (True, "poll")
    sync(plan, "poll", START + 50.5, compared=False)
    assert plan.next(polling=True) == (START + 51, "poll")


def test_a_rename_goes_before_a_poll_that_is_due_at_the_same_time() -> None:
    plan = scheduler(poll_interval=1)
    plan.notify(START)
    assert plan.next(polling=True) == (START, "rename")


# ------------------------------------------------------------------------------ resync


def test_resync_counts_from_the_last_comparison() -> None:
    plan = scheduler(resync=10)
    assert plan.next(polling=False) == (START + 10, "resync")
    sync(plan, "rename", START + 4, seconds=1)
    assert plan.next(polling=False) == (START + 15, "resync")
    sync(plan, "poll", START + 6, compared=False)  # the file had not changed: nothing compared
    assert plan.next(polling=False) == (START + 15, "resync")
    sync(plan, "resync", START + 15)
    assert plan.next(polling=False) == (START + 25, "resync")


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_resync_that_failed_is_not_due_again_at_once(seconds: float) -> None:
    plan = scheduler(resync=10)
    sync(plan, "resync", START + 10, seconds=seconds, compared=False)
    assert plan.next(polling=False) == (START + 20 + seconds, "resync")


# ------------------------------------------------------------------------------ retry


def test_a_retry_is_due_once() -> None:
    plan = scheduler()
    sync(plan, "rename", START, seconds=1, compared=False, retry_in=0.5)
    assert plan.next(polling=False) == (START + 1.5, "retry")
    sync(plan, "retry", START + 1.5, compared=False)
    assert plan.next(polling=False)[1] != "retry"


def test_a_retry_that_fails_too_may_ask_for_another() -> None:
    plan = scheduler()
    sync(plan, "rename", START, compared=False, retry_in=1)
    sync(plan, "retry", START + 1, compared=False, retry_in=2)
    assert plan.next(polling=False) == (START + 3, "retry")


def test_a_sync_that_had_nothing_to_do_leaves_the_retry_alone() -> None:
    plan = scheduler()
    sync(plan, "rename", START, compared=False, retry_in=5)
    sync(plan, "sweep", START + 2, compared=False)
    assert plan.next(polling=False) == (START + 5, "retry")


def test_a_late_sweep_does_not_swallow_the_retry() -> None:
    """A sweep may find nothing new and do nothing; what is to be retried still is."""
    plan = scheduler()
    sync(plan, "rename", START, compared=False, retry_in=1)
    sync(plan, "sweep", START + 1, compared=False)
    assert plan.next(polling=False) == (START + 1, "retry")


def test_a_comparison_makes_the_retry_needless() -> None:
    plan = scheduler()
    sync(plan, "rename", START, compared=False, retry_in=1)
    sync(plan, "rename", START + 0.5, compared=True)
    assert plan.next(polling=False)[1] != "retry"


def test_a_rename_just_after_an_idle_sync_is_served_at_once() -> None:
    """Measured before: one rename in thirty met a sweep that had found nothing, and waited."""
    plan = scheduler()
    sync(plan, "sweep", START + 1, idle=True, compared=False)
    plan.notify(START + 1 + TICK)
    assert plan.next(polling=False) == (START + 1 + TICK, "rename")


# ------------------------------------------------------------------------------ request


def test_a_request_is_served_once_and_at_once() -> None:
    plan = scheduler()
    plan.request(START + 3)
    plan.request(START + 4)
    assert plan.next(polling=False) == (START + 3, "request")
    sync(plan, "request", START + 4)
    assert plan.next(polling=False)[1] != "request"


def test_requests_just_after_a_sync_merge_into_one() -> None:
    plan = scheduler()
    sync(plan, "rename", START)
    for number in range(1, 5):
        plan.request(START + number * TICK)
        assert plan.next(polling=False) == (START + DEBOUNCE, "request")
    sync(plan, "request", START + DEBOUNCE)
    assert plan.next(polling=False)[1] != "request"
