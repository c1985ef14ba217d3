"""One thread for all that may block, which the process can leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeAlias, TypeVar

import anyio

from mbcap_watch.limits import no_thread
from mbcap_watch.tasks import uncancelled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from types import TracebackType
    from typing import Self

# A read takes milliseconds, on a slow network perhaps a second.
STUCK_SECONDS: Final = 5.0

# Stopping an observer takes up to half a second, a batch of rows milliseconds. What takes longer
# hangs in the kernel.
END_SECONDS: Final = 2.0

P = ParamSpec("P")
T = TypeVar("T")
OnStuck: TypeAlias = "Callable[[float | None], Awaitable[None]]"


class Worker:
    """Runs blocking calls, one after the other, off the event loop.

    A read on a mount whose server is gone blocks in the kernel for as long as that lasts. The
    threads of anyio and of `concurrent.futures` are joined when the interpreter exits, so one of
    them would keep the process from ending (measured: a FIFO opened in one). This thread is a
    daemon: a stuck call can be left behind, and there is never more than one.

    Leaving the context waits, whatever cancels it, until the call under way and then `at_end`
    are done, but not for longer than `END_SECONDS`.

    Args:
        on_stuck: called with the time (seconds since the epoch) since when a call shows no
            progress, every `STUCK_SECONDS` while that lasts, and with None when it goes on.
            Called with None as well every `STUCK_SECONDS` while a long call gets on.

    """

    def __init__(self, on_stuck: OnStuck | None = None) -> None:
        self.at_end: Callable[[], None] | None = None
        self._on_stuck = on_stuck
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._progress = 0.0
        self._runner = asyncio.Runner()
        self._thread: threading.Thread | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._calls.put(None)
        await uncancelled(self._end())

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function` in the thread and return what it returns, or raise what it raises.

        A cancelled caller leaves at once; the call goes on in the thread, and its outcome is
        dropped.

        Raises:
            BlockingIOError: there is no thread to be had for now; the next call tries again.

        """
        self._start()
        future: asyncio.Future[T] = self._loop.create_future()

        def resolve(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # it is a T: there is no error

        def run() -> None:
            result, error = None, None
            try:
                result = function(*args, **kwargs)
            except BaseException as exc:  # noqa: BLE001 - it is raised in the caller
                error = exc
            self._tell(resolve, result, error)

        self.note_progress()
        self._calls.put(run)
        try:
            if self._on_stuck is not None:
                await self._watch_over(future, self._on_stuck)
            return await future
        finally:
            future.cancel()  # of no effect unless the caller leaves: then nobody asks for it

    def note_progress(self) -> None:
        """Say, from the thread, that a long call is not stuck."""
        self._progress = time.monotonic()

    async def _watch_over(self, future: asyncio.Future[Any], on_stuck: OnStuck) -> None:
        seen = self._progress
        while not future.done():
            idle = time.monotonic() - self._progress
            if idle < STUCK_SECONDS:
                await asyncio.wait([future], timeout=STUCK_SECONDS - idle)
                if self._progress != seen and not future.done():
                    seen = self._progress
                    await on_stuck(None)
                continue
            since = time.time() - idle
            while not future.done() and time.monotonic() - self._progress >= STUCK_SECONDS:
                await on_stuck(since)
                await asyncio.wait([future], timeout=STUCK_SECONDS)
            await on_stuck(None)

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="mbcap-watch", daemon=True)
            try:
                thread.start()
            except RuntimeError as exc:
                raise no_thread() from exc
            self._thread = thread

    async def _end(self) -> None:
        if self._thread is None:
            return
        with anyio.move_on_after(END_SECONDS):
            await self._ended.wait()
            self._thread.join()

    # In the thread from here on.

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the event loop of this thread, and return what it returns.

        The loop is made when it is first needed, and kept: making one takes 0.25 ms and three
        descriptors.
        """
        return self._runner.run(work)

    def _run(self) -> None:
        with contextlib.closing(self._runner):  # `with self._runner` would make the loop now
            while (call := self._calls.get()) is not None:
                call()
                del call  # and with it, until the next one, what it returned: a whole snapshot
        if self.at_end is not None:
            self.at_end()
        self._tell(self._ended.set)

    def _tell(self, callback: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            return  # the loop was closed under a host that did not wait: nobody listens
