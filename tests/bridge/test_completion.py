"""Work that runs to its end, whichever way its caller is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import selectors
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mbcap_watch.bridge.thread import run_to_completion
from support import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio
LOOPS = ["asyncio", "uvloop"]


class Work:
    """Work that ends when it is told to, and notes what happened in which order.

    With `lasts`, in seconds, it ends by itself.
    """

    def __init__(self, lasts: float | None = None) -> None:
        self.lasts = lasts
        self.notes: list[str] = []
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()

    async def run(self) -> str:
        self.notes.append("begun")
        self.begun.set()
        if self.lasts is not None:
            asyncio.get_running_loop().call_later(self.lasts, self.may_end.set)
        try:
            async with asyncio.timeout(DEADLINE):
                await self.may_end.wait()
        except asyncio.CancelledError:
            self.notes.append("torn")
            raise
        self.notes.append("ended")
        return "result"

    async def fail(self) -> str:
        await self.run()
        raise LookupError("the work failed")


async def turns(count: int = 20) -> None:
    """Let everything run that is ready."""
    for _ in range(count):
        await asyncio.sleep(0)


# ------------------------------------------------------------------------------ left alone


async def test_returns_what_the_work_returns() -> None:
    work = Work()
    work.may_end.set()
    assert await run_to_completion(work.run()) == "result"
    assert work.notes == ["begun", "ended"]


async def test_raises_what_the_work_raises() -> None:
    work = Work()
    work.may_end.set()
    with pytest.raises(LookupError, match="the work failed"):
        await run_to_completion(work.fail())
    assert work.notes == ["begun", "ended"]


# ------------------------------------------------------------------------------ cancelled


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_native_cancellation_waits_for_the_end(times: int) -> None:
    work = Work()
    caller = asyncio.create_task(run_to_completion(work.run()))
    await work.begun.wait()
    for _ in range(times):
        caller.cancel()
        await turns()
    assert work.notes == ["begun"]  # however often the caller is cancelled
    assert not caller.done()
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert work.notes == ["begun", "ended"]


async def test_several_cancels_in_one_turn_of_the_loop() -> None:
    work = Work(lasts=0.05)
    caller = asyncio.create_task(run_to_completion(work.run()))
    await work.begun.wait()
    for _ in range(3):
        caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert work.notes == ["begun", "ended"]


async def test_the_message_of_a_cancellation_survives() -> None:
    work = Work(lasts=0.05)
    caller = asyncio.create_task(run_to_completion(work.run()))
    await work.begun.wait()
    caller.cancel("closing time")
    with pytest.raises(asyncio.CancelledError, match="closing time"):
        await caller


async def test_an_anyio_scope_waits_for_the_end_and_catches_its_own() -> None:
    work = Work()
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:

            async def cancel_then_release() -> None:
                await work.begun.wait()
                scope.cancel()
                with anyio.CancelScope(shield=True):
                    await turns()
                    await turns()  # anyio cancels on every turn; none may get through
                    work.notes.append("released")
                    work.may_end.set()

            group.start_soon(cancel_then_release)
            await run_to_completion(work.run())
            work.notes.append("went on")
    assert scope.cancelled_caught
    assert work.notes == ["begun", "released", "ended"]


async def test_a_scope_that_was_cancelled_before_still_gets_the_work_done() -> None:
    work = Work(lasts=0.05)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await run_to_completion(work.run())
        work.notes.append("went on")
    assert scope.cancelled_caught
    assert sorted(work.notes) == ["begun", "ended"]


async def test_a_native_cancellation_behind_one_of_anyio_is_not_swallowed_by_the_scope() -> None:
    work = Work()
    scope = anyio.CancelScope()

    async def call() -> None:
        with scope:
            await run_to_completion(work.run())
        work.notes.append("went on")  # the scope must not take the native one for its own

    caller = asyncio.create_task(call())
    await work.begun.wait()
    scope.cancel()
    await turns()
    caller.cancel()
    await turns()
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert work.notes == ["begun", "ended"]


async def test_asyncio_run_that_is_interrupted_waits_for_the_end() -> None:
    # What Ctrl-C does under `asyncio.run`: the main task is cancelled, then the loop is closed.
    notes: list[str] = []

    def in_a_loop_of_its_own() -> None:
        async def main() -> None:
            work = Work(lasts=0.05)
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_soon(task.cancel)
            try:
                await run_to_completion(work.run())
            finally:
                notes.extend(work.notes)

        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(main())

    await anyio.to_thread.run_sync(in_a_loop_of_its_own)
    assert notes[-1] == "ended"
    assert "torn" not in notes


async def test_the_failure_of_work_whose_caller_left_is_not_reported_as_lost() -> None:
    loop = asyncio.get_running_loop()
    reported: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: reported.append(context))
    try:
        work = Work(lasts=0.05)
        caller = asyncio.create_task(run_to_completion(work.fail()))
        await work.begun.wait()
        caller.cancel()
        await asyncio.wait([caller])  # to await it would keep its exception, and the task, alive
        assert caller.cancelled()
        del caller
        gc.collect()  # asyncio reports a task's lost exception when the task goes
        await turns()
    finally:
        loop.set_exception_handler(None)
    assert work.notes == ["begun", "ended"]
    assert reported == []


# ------------------------------------------------------------------------------ at rest


class CountingSelector(selectors.DefaultSelector):
    """Counts the turns of the loop: there is one `select` in each."""

    turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.turns += 1
        return super().select(timeout)


async def natively(call: Callable[[], Any], work: Work) -> None:
    caller = asyncio.create_task(call())
    await work.begun.wait()
    for _ in range(3):
        caller.cancel()
        await turns(3)
    await asyncio.wait([caller])
    assert caller.cancelled()


async def by_scope(call: Callable[[], Any], work: Work) -> None:
    with anyio.CancelScope() as scope:
        work_begun = asyncio.create_task(work.begun.wait())
        work_begun.add_done_callback(lambda _: scope.cancel())
        await call()
    assert scope.cancelled_caught


async def by_timeout(call: Callable[[], Any], work: Work) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await call()
    assert work.begun.is_set()


@pytest.mark.parametrize("cancelled", [natively, by_scope, by_timeout])
def test_a_cancelled_caller_waits_without_spinning(cancelled: Any) -> None:
    selector = CountingSelector()

    async def main() -> int:
        work = Work()
        counts: list[int] = []

        loop = asyncio.get_running_loop()
        # Turns are counted over a stretch in which nobody has anything to do.
        loop.call_later(0.1, lambda: counts.append(selector.turns))
        loop.call_later(0.3, lambda: counts.append(selector.turns))
        loop.call_later(0.3, work.may_end.set)
        await cancelled(lambda: run_to_completion(work.run()), work)
        assert work.notes == ["begun", "ended"]
        before, after = counts
        return after - before

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        # One that spins makes thousands of turns in that time.
        assert runner.run(main()) < 20
