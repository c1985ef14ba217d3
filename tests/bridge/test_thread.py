"""The thread for calls that may block."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mbcap_watch.bridge.thread import Worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.anyio
DEADLINE = 20.0
THREAD = "mbcap-watch"


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a context does not wait for seconds for a call that is stuck."""
    monkeypatch.setattr("mbcap_watch.bridge.thread.END_SECONDS", 0.2)


def threads() -> list[threading.Thread]:
    """List the threads of workers."""
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait, in a thread, for what another thread does."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


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


async def blocked_in(worker: Worker, blocked: Blocked, *args: Any) -> asyncio.Task[object]:
    """Start a call and wait until it is stuck in the thread."""
    call = asyncio.create_task(worker.call(blocked, *args))
    assert await asyncio.to_thread(blocked.entered.wait, DEADLINE)
    return call


# ------------------------------------------------------------------------------ calls


async def test_a_call_returns_what_the_function_returns() -> None:
    def function(*args: int, **kwargs: int) -> tuple[tuple[int, ...], dict[str, int]]:
        return args, kwargs

    async with Worker() as worker:
        assert await worker.call(function, 1, 2, three=3) == ((1, 2), {"three": 3})


@pytest.mark.parametrize(
    "error", [OSError(5, "EIO"), KeyError("x"), ExceptionGroup("g", [OSError()])]
)
async def test_a_call_raises_what_the_function_raises(error: Exception) -> None:
    def function() -> None:
        raise error

    async with Worker() as worker:
        with pytest.raises(type(error)) as caught:
            await worker.call(function)
        assert caught.value is error
        assert await worker.call(lambda: "goes on") == "goes on"


async def test_calls_run_in_one_thread_apart_from_the_loop() -> None:
    async with Worker() as worker:
        names = {(await worker.call(threading.current_thread)).name for _ in range(3)}
        assert names == {THREAD}
        assert len(threads()) == 1


async def test_one_call_at_a_time_in_the_order_asked_for() -> None:
    running: list[int] = []
    together: list[int] = []
    order: list[int] = []

    def function(number: int) -> None:
        running.append(number)
        time.sleep(0.001)  # gives a second thread, were there one, the time to be seen
        together.append(len(running))
        order.append(number)
        running.remove(number)

    async with Worker() as worker, asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(worker.call(function, number))
    assert order == list(range(20))
    assert set(together) == {1}


async def test_the_loop_runs_while_a_call_blocks() -> None:
    blocked = Blocked()
    async with Worker() as worker:
        call = await blocked_in(worker, blocked, "result")
        for _ in range(100):
            await asyncio.sleep(0)
        assert not call.done()
        blocked.release.set()
        assert await call == "result"


# ------------------------------------------------------------------------------ left behind


async def test_a_cancelled_caller_leaves_at_once() -> None:
    blocked = Blocked()
    async with Worker() as worker:
        call = await blocked_in(worker, blocked)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert not blocked.release.is_set()  # the caller is gone, the call is not
        following = asyncio.create_task(worker.call(lambda: "next"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not following.done()  # still one at a time
        blocked.release.set()
        assert await following == "next"
    assert threads() == []


async def test_a_deadline_of_anyio_is_kept() -> None:
    blocked = Blocked()
    async with Worker() as worker:
        with anyio.move_on_after(0.01) as scope:
            await worker.call(blocked)
        assert scope.cancelled_caught
        blocked.release.set()


@pytest.mark.parametrize("outcome", ["late", OSError("late")])
async def test_the_outcome_of_a_call_whose_caller_left_is_dropped(outcome: object) -> None:
    reported: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    try:
        blocked = Blocked()
        async with Worker() as worker:
            call = await blocked_in(worker, blocked, outcome)
            call.cancel()
            await asyncio.wait([call])
            blocked.release.set()
            await worker.call(lambda: None)
    finally:
        loop.set_exception_handler(None)
    assert reported == []


async def test_what_a_call_returned_is_not_kept() -> None:
    async with Worker() as worker:
        returned = weakref.ref(await worker.call(Blocked))
        await asyncio.to_thread(wait_until, lambda: returned() is None)


async def test_the_thread_is_gone_after_the_context() -> None:
    async with Worker() as worker:
        await worker.call(lambda: None)
        assert len(threads()) == 1
    assert threads() == []


async def test_the_thread_is_gone_after_an_error_in_the_context() -> None:
    with pytest.raises(LookupError):
        async with Worker():
            raise LookupError
    assert threads() == []


async def test_a_stuck_thread_does_not_hold_up_the_context_and_ends_when_it_can() -> None:
    blocked = Blocked()
    async with Worker() as worker:
        call = await blocked_in(worker, blocked)
        call.cancel()
        await asyncio.wait([call])
    assert len(threads()) == 1
    blocked.release.set()
    await asyncio.to_thread(wait_until, lambda: not threads())


def test_a_call_that_outlives_its_loop_ends_in_silence() -> None:
    # An exception in the thread would be a warning here, and warnings are errors.
    blocked = Blocked()

    async def main() -> None:
        async with Worker() as worker:
            (await blocked_in(worker, blocked)).cancel()

    asyncio.run(main())
    (thread,) = threads()
    blocked.release.set()
    thread.join(DEADLINE)
    assert not thread.is_alive()


# ------------------------------------------------------------------------------ stuck


class Told:
    """Hears what the worker has to say of stuck calls."""

    def __init__(self) -> None:
        self.times: list[float | None] = []
        self.told = asyncio.Event()

    async def __call__(self, since: float | None) -> None:
        self.times.append(since)
        self.told.set()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call counts as stuck after an instant, not after seconds."""
    monkeypatch.setattr("mbcap_watch.bridge.thread.STUCK_SECONDS", 0.01)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("outcome", ["late", OSError("late")])
async def test_a_stuck_call_is_told_and_so_is_its_end(outcome: object) -> None:
    told, blocked = Told(), Blocked()
    before = time.time()
    async with Worker(told) as worker, asyncio.timeout(DEADLINE):
        call = await blocked_in(worker, blocked, outcome)
        await told.told.wait()
        assert not call.done()
        blocked.release.set()
        await asyncio.wait([call])
        if isinstance(outcome, Exception):
            assert call.exception() is outcome
        else:
            assert call.result() == outcome
    *repeated, end = told.times
    (since,) = set(repeated)
    assert since is not None
    assert before <= since <= time.time()
    assert end is None


@pytest.mark.usefixtures("soon")
async def test_a_call_that_stays_stuck_is_told_again() -> None:
    told, blocked = Told(), Blocked()
    async with Worker(told) as worker, asyncio.timeout(DEADLINE):
        await blocked_in(worker, blocked)
        while len(told.times) < 3:
            told.told.clear()
            await told.told.wait()
        assert len(set(told.times)) == 1
        blocked.release.set()


async def test_a_long_call_that_gets_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbcap_watch.bridge.thread.STUCK_SECONDS", 1.0)
    told, end = Told(), threading.Event()

    async with Worker(told) as worker, asyncio.timeout(DEADLINE):

        def get_on() -> None:
            while not end.wait(0.01):
                worker.note_progress()

        call = asyncio.create_task(worker.call(get_on))
        await told.told.wait()
        assert told.times == [None]
        end.set()
        await call
    assert told.times == [None]


async def test_a_quick_call_is_not_told() -> None:
    told = Told()
    async with Worker(told) as worker:
        assert await worker.call(lambda: 1) == 1
        with pytest.raises(ZeroDivisionError):
            await worker.call(lambda: 1 // 0)
    assert told.times == []


@pytest.mark.usefixtures("soon")
async def test_the_caller_of_a_stuck_call_can_leave() -> None:
    told, blocked = Told(), Blocked()
    async with Worker(told) as worker, asyncio.timeout(DEADLINE):
        call = await blocked_in(worker, blocked)
        await told.told.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        blocked.release.set()


STUCK = """
import asyncio, os, sys
import anyio
from mbcap_watch.bridge.thread import Worker

async def main():
    async with Worker() as worker:
        with anyio.move_on_after(0.1):
            await worker.call(os.open, sys.argv[1], os.O_RDONLY)  # nobody ever writes
    print("left", flush=True)

asyncio.run(main())
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


NO_DESCRIPTORS = """
import asyncio, os, resource
import anyio
from mbcap_watch.bridge.thread import Worker

async def main():
    with anyio.move_on_after(1):  # anyio imports what it needs with the first use
        await anyio.sleep(0)
    lowest = os.dup(0)
    os.close(lowest)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    async with asyncio.timeout(5), Worker() as worker:
        print(await worker.call(lambda: "called"), flush=True)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        print(await worker.call(lambda: worker.run(asyncio.sleep(0, "run"))), flush=True)

asyncio.run(main())
"""


def test_calls_do_without_descriptors_and_the_loop_comes_when_there_are_some() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_DESCRIPTORS],
        check=False,
        text=True,
        capture_output=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "called\nrun\n", "")
