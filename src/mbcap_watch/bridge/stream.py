"""`watch`: results to pull, for hosts that prefer a loop of their own to a callback."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from mbcap_watch.bridge.run import run
from mbcap_watch.bridge.tasks import require_asyncio, uncancelled
from mbcap_watch.bridge.trigger import Trigger
from mbcap_watch.results import PersistResult, WatchState

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from mbcap_watch.settings import Settings

DEFAULT_BUFFER = 64


def watch(settings: Settings, *, buffer: int = DEFAULT_BUFFER) -> Results:
    """Run a bridge for as long as the context lasts, and iterate over its results.

        async with watch(settings) as results:
            async for result in results:
                ...

    Entering returns once the watch is armed and the first look is done; leaving ends the bridge.

    Args:
        settings: what to watch, and how.
        buffer: results kept for a slow host. The bridge never waits for the host: when there are
            more, the oldest are dropped. What is dropped is only the report; the rows are written
            all the same.

    """
    return Results(settings, buffer)


class Results:
    """The results of a running bridge; made by `watch`.

    Attributes:
        dropped: results that the host was too slow for.
        state: how the bridge watches.

    """

    def __init__(self, settings: Settings, buffer: int) -> None:
        if buffer < 1:
            raise ValueError(f"buffer must be at least 1, got {buffer}")
        self.dropped = 0
        self.state = WatchState()
        self._settings = settings
        self._waiting: deque[PersistResult] = deque(maxlen=buffer)
        self._started = asyncio.Event()
        self._news = asyncio.Event()
        self._trigger = Trigger()
        self._task: asyncio.Task[None] | None = None

    def look_now(self) -> None:
        """Have the bridge look and compare at once; from any thread."""
        self._trigger.look_now()

    async def __aenter__(self) -> Self:
        loop = require_asyncio()
        bridge = run(
            self._settings,
            on_result=self._put,
            on_state=self._set_state,
            trigger=self._trigger,
        )
        self._task = loop.create_task(bridge)
        self._task.add_done_callback(self._note_end)
        try:
            await self._started.wait()
        except asyncio.CancelledError:
            await self._end()
            raise
        if self._task.done():
            self._task.result()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._end()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> PersistResult:
        """Return the next result, in order.

        Raises:
            StopAsyncIteration: the context was left.

        """
        while not self._waiting:
            if self._task is None or self._task.done():
                if self._task is not None and not self._task.cancelled():
                    self._task.result()
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()

    async def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await uncancelled(_ended(self._task))

    def _put(self, result: PersistResult) -> None:
        self.dropped += len(self._waiting) == self._waiting.maxlen
        self._waiting.append(result)
        self._news.set()

    def _set_state(self, state: WatchState) -> None:
        self.state = state
        if state.last_look is not None or state.stuck_since is not None:
            self._started.set()  # the first look is done, or may never be

    def _note_end(self, _: asyncio.Task[None]) -> None:
        self._started.set()
        self._news.set()


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # an iteration has raised it, or nobody asked
