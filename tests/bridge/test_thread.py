"""The bridge's thread: calls that may block, a loop of its own, and leaving it behind."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING

import anyio
import pytest

from mbcap_watch.bridge.report import SyncReport
from mbcap_watch.bridge.service import Border
from mbcap_watch.bridge.thread import BridgeThread, in_daemon_thread
from mbcap_watch.results import PersistResult, WatchState
from support import DEADLINE, open_descriptors, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
LOOPS = ["asyncio", "uvloop", "trio"]
THREAD = "mbcap-watch"


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


class Blocked:
    """A call that is stuck until it is released."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()

    def __call__(self, outcome: object = "late") -> object:
        self.entered.set()
        assert self.release.wait(DEADLINE)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


# ------------------------------------------------------------------------------ one call


@pytest.mark.parametrize(
    "error", [OSError(5, "EIO"), KeyError("x"), ExceptionGroup("g", [OSError()])]
)
async def test_a_call_raises_what_the_function_raises(error: Exception) -> None:
    def function() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await in_daemon_thread(function)
    assert caught.value is error


async def test_the_loop_runs_while_a_call_blocks() -> None:
    blocked, turns = Blocked(), 0

    async def release() -> None:
        nonlocal turns
        await until(blocked.entered.is_set)
        for turns in range(100):  # noqa: B007 - counted
            await anyio.sleep(0)
        blocked.release.set()

    async with anyio.create_task_group() as group:
        group.start_soon(release)
        assert await in_daemon_thread(blocked, "result") == "result"
    assert turns == 99


@pytest.mark.parametrize("outcome", ["late", OSError("late")])
async def test_a_cancelled_caller_leaves_at_once_and_the_outcome_is_dropped(
    outcome: object,
) -> None:
    blocked = Blocked()
    with anyio.move_on_after(0.01) as scope:
        await in_daemon_thread(blocked, outcome)
    assert scope.cancelled_caught
    assert not blocked.release.is_set()  # the caller is gone, the call is not
    blocked.release.set()
    await until(lambda: not threads())


async def test_what_a_call_returned_is_not_kept() -> None:
    returned = weakref.ref(await in_daemon_thread(Blocked))
    gc.collect()
    assert returned() is None


async def test_a_thread_goes_when_nobody_has_it() -> None:
    assert not gc.isenabled()
    async with BridgeThread(anyio.lowlevel.checkpoint) as thread:
        thread.start()
        await thread.outcome()
    left = weakref.ref(thread)
    del thread
    await until(lambda: left() is None)


async def test_without_a_thread_the_call_fails(few_threads: Callable[[int], None]) -> None:
    few_threads(0)
    with pytest.raises(BlockingIOError):
        await in_daemon_thread(Blocked())


# ------------------------------------------------------------------------------ a loop of its own


async def test_main_runs_in_a_loop_and_a_thread_apart_from_the_host() -> None:
    async def main() -> tuple[str, type[object]]:
        await anyio.sleep(0)
        return threading.current_thread().name, type(asyncio.get_running_loop())

    thread = BridgeThread(main)
    thread.start()
    async with thread:
        name, loop = await thread.outcome()
    assert name == THREAD
    assert issubclass(loop, asyncio.SelectorEventLoop), "a plain one, whatever the host's is"
    assert threads() == []


async def test_leaving_cancels_main_once() -> None:
    seen: list[str] = []

    async def main() -> None:
        try:
            seen.append("begun")
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
            seen.append("ended")

    thread = BridgeThread(main)
    thread.start()
    async with thread:
        await until(lambda: seen)
    assert seen == ["begun", "ended"]
    assert threads() == []


async def test_a_stuck_main_does_not_hold_up_the_host_and_ends_when_it_can() -> None:
    blocked, went_on = Blocked(), False

    async def main() -> None:
        nonlocal went_on
        blocked()
        await anyio.sleep(0)
        went_on = True

    thread = BridgeThread(main, patience=0.2)
    thread.start()
    async with thread:
        await until(blocked.entered.is_set)
    assert len(threads()) == 1
    blocked.release.set()
    await until(lambda: not threads())
    assert not went_on, "it was cancelled while it was stuck"


async def test_a_function_is_called_in_the_loop_of_the_thread_and_not_after_its_end() -> None:
    called: list[str] = []

    def function() -> None:
        called.append(threading.current_thread().name)

    thread = BridgeThread(anyio.sleep_forever)
    thread.call(function)  # there is no loop yet: of no consequence
    thread.start()
    async with thread:
        thread.call(function)
        await until(lambda: called)
    thread.call(function)
    assert called == [THREAD]


def test_a_coroutine_that_is_closed_only_signals() -> None:
    """Nothing can be awaited under GeneratorExit; the thread ends by itself."""

    async def host() -> None:
        thread = BridgeThread(anyio.sleep_forever)
        thread.start()
        async with thread:
            await anyio.sleep_forever()

    async def main() -> None:
        coroutine = host()
        coroutine.send(None)
        coroutine.close()

    asyncio.run(main())


def test_a_main_that_outlives_the_hosts_loop_ends_in_silence() -> None:
    # An exception in the thread would be a warning here, and warnings are errors.
    blocked = Blocked()

    async def stuck() -> None:
        blocked()

    async def main() -> None:
        thread = BridgeThread(stuck, patience=0.2)
        thread.start()
        async with thread:
            await until(blocked.entered.is_set)

    asyncio.run(main())
    (thread,) = threads()
    blocked.release.set()
    thread.join(DEADLINE)
    assert not thread.is_alive()


@pytest.mark.parametrize("spare", range(3))
async def test_without_descriptors_or_threads_nothing_is_left_behind(
    few_threads: Callable[[int], None], spare: int
) -> None:
    before = open_descriptors()
    held = [os.open(os.devnull, os.O_RDONLY)]
    import resource  # noqa: PLC0415 - for this test alone

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 1 + spare, hard))
        with pytest.raises(OSError, match="open files"):
            BridgeThread(anyio.sleep_forever).start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(held[0])
    few_threads(0)
    with pytest.raises(BlockingIOError):
        BridgeThread(anyio.sleep_forever).start()
    assert open_descriptors() == before


STUCK = """
import os, sys, threading
import anyio
from mbcap_watch.bridge import thread

begun = threading.Event()

async def stuck():
    begun.set()
    os.open(sys.argv[1], os.O_RDONLY)  # nobody ever writes

async def main():
    bridge = thread.BridgeThread(stuck, patience=0.1)
    bridge.start()
    async with bridge:
        begun.wait()
    print("left", flush=True)

anyio.run(main)
"""


def test_a_stuck_call_does_not_keep_the_process(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    done = subprocess.run(
        [sys.executable, "-c", STUCK, fifo],
        check=False,
        text=True,
        capture_output=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


# ------------------------------------------------------------------------------ telling


def report(number: int) -> SyncReport:
    return SyncReport(result=PersistResult(outcome="applied", reason="rename", entries=number))


async def test_a_host_that_stalls_is_woken_once_and_loses_the_oldest_reports() -> None:
    wakes: list[object] = []
    border = Border(wakes.append, buffer=3)
    for number in range(10):
        border.tell(WatchState(read_errors=number), report(number))
    assert len(wakes) == 1, "a loop that stands still is not given ten callbacks"
    assert border.state.reports_dropped == 7
    border.wake()
    assert await border.wait()
    taken = [border.take() for _ in range(4)]
    assert taken == [report(7), report(8), report(9), None]
    assert border.state.read_errors == 9
    border.tell(WatchState(), None)  # a sync that had nothing to do
    assert len(wakes) == 2
    assert border.take() is None
