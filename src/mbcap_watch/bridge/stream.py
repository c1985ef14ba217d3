"""`watch`: results to pull, for hosts that prefer a loop of their own to a callback."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mbcap_watch.bridge.border import DEFAULT_BUFFER
from mbcap_watch.bridge.run import Service
from mbcap_watch.results import PersistResult, WatchState

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from mbcap_watch.settings import Settings


def watch(settings: Settings, *, buffer: int = DEFAULT_BUFFER) -> Results:
    """Run a bridge for as long as the context lasts, and iterate over its results.

        async with watch(settings) as results:
            async for result in results:
                ...

    Entering returns once the watch is armed and the first sync is done; leaving ends the bridge.

    Args:
        settings: what to watch, and how.
        buffer: results kept for a slow host. The bridge never waits for the host: when there are
            more, the oldest are dropped. What is dropped is only the report; the rows are written
            all the same.

    """
    return Results(settings, buffer)


class Results:
    """The results of a running bridge; made by `watch`."""

    def __init__(self, settings: Settings, buffer: int) -> None:
        if buffer < 1:
            raise ValueError(f"buffer must be at least 1, got {buffer}")
        self._settings = settings
        self._buffer = buffer
        self._service: Service | None = None
        self._not_started: PersistResult | None = None

    @property
    def dropped(self) -> int:
        """Results that the host was too slow for."""
        return self._service.border.dropped if self._service is not None else 0

    @property
    def state(self) -> WatchState:
        """How the bridge watches."""
        return self._service.border.state if self._service is not None else WatchState()

    def sync_now(self) -> None:
        """Have the bridge sync and compare at once; from any thread."""
        if self._service is not None:
            self._service.sync_now()

    async def __aenter__(self) -> Self:
        self._service = service = Service(self._settings, self._buffer)
        self._not_started = service.start()
        if self._not_started is not None:
            return self
        try:
            # The first sync is done, or may never be.
            while self.state.last_sync is None and self.state.stuck_since is None:
                await service.border.wait()
                if service.thread.ended.is_set():
                    await service.thread.outcome()
        except BaseException as exc:
            await service.thread.__aexit__(type(exc), exc, None)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._service is not None:
            await self._service.thread.__aexit__(exc_type, exc, traceback)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> PersistResult:
        """Return the next result, in order.

        While the machine has no thread for the bridge, that is the result, and asking for the next
        one tries again.

        Raises:
            StopAsyncIteration: the context was left.

        """
        if self._service is None:
            raise StopAsyncIteration
        border, thread = self._service.border, self._service.thread
        while not thread.started:
            if thread.stopped:
                raise StopAsyncIteration
            if self._not_started is not None:
                result, self._not_started = self._not_started, None
                return result
            await self._service.pause()
            self._not_started = self._service.start()
        while True:
            report = border.take()
            if report is not None and report.result is not None:
                return report.result
            if thread.ended.is_set():
                if not thread.stopped:
                    await thread.outcome()
                raise StopAsyncIteration
            await border.wait()
