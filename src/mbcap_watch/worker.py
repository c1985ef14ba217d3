"""One thread for calls that may block, which the process can leave behind."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType
    from typing import Self

# A read takes milliseconds, on a slow network perhaps a second.
STUCK_SECONDS: Final = 5.0

P = ParamSpec("P")
T = TypeVar("T")
OnStuck: TypeAlias = "Callable[[float | None], Awaitable[None]]"


class Worker:
    """Runs blocking calls, one after the other, off the event loop.

    A read on a mount whose server is gone blocks in the kernel for as long as that lasts. The
    threads of anyio and of `concurrent.futures` are joined when the interpreter exits, so one of
    them would keep the process from ending (measured: a FIFO opened in one). This thread is a
    daemon: a stuck call can be left behind, and there is never more than one.

    Args:
        on_stuck: called with the time (seconds since the epoch) when a call has not come back
            for `STUCK_SECONDS`, and with None once it has.

    """

    def __init__(self, on_stuck: OnStuck | None = None) -> None:
        self._on_stuck = on_stuck
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mbcap-watch-files", daemon=True)
        self._running = 0

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._calls.put(None)
        if not self._running:
            self._thread.join()  # idle: it ends at once

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function` in the thread and return what it returns, or raise what it raises.

        A cancelled caller leaves at once; the call goes on in the thread, and its outcome is
        dropped.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def resolve(result: T | None, error: BaseException | None) -> None:
            self._running -= 1
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
            try:
                loop.call_soon_threadsafe(resolve, result, error)
            except RuntimeError:
                return  # the loop was closed meanwhile: nobody waits any more

        self._running += 1
        self._calls.put(run)
        if self._on_stuck is not None:
            await self._watch_over(future, self._on_stuck)
        return await future

    @staticmethod
    async def _watch_over(future: asyncio.Future[Any], on_stuck: OnStuck) -> None:
        done, _ = await asyncio.wait([future], timeout=STUCK_SECONDS)
        if not done:
            await on_stuck(time.time())
            await asyncio.wait([future])
            await on_stuck(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
