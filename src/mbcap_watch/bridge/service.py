"""A running bridge as its host sees it: reports, the state of the watch, and `watch`."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

import anyio

from mbcap_watch.bridge.lent import lent, require_both
from mbcap_watch.bridge.loop import Bridge
from mbcap_watch.bridge.report import SyncReport, out_of_resources
from mbcap_watch.bridge.thread import BridgeThread
from mbcap_watch.limits import STUCK_SECONDS
from mbcap_watch.results import PersistResult, Timings, WatchState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from typing import Self

    from mbcap_watch.bridge.host import Lock
    from mbcap_watch.bridge.lent import HostConnection, Lendable
    from mbcap_watch.bridge.thread import CallHost
    from mbcap_watch.settings import Settings

# Reports kept for a host that does not take them.
DEFAULT_BUFFER: Final = 64


class Listener(Protocol):
    """What hears all that a bridge tells, in the host's loop; `telemetry/control` has one."""

    settings: Settings

    def connected(self, state: Callable[[], WatchState]) -> AbstractContextManager[object]:
        """Listen within the context, to a bridge of which `state` tells how it watches."""

    def hear(
        self,
        state: WatchState,
        result: PersistResult | None = None,
        timings: Timings | None = None,
    ) -> object:
        """Hear how the bridge watches, and what came of a sync; may not wait."""


class Border:
    """Carries what the bridge tells to the host's loop, and never holds up either of them.

    The bridge calls `alive` and `tell`, the host's loop all else. When a slow host has more than
    `buffer` reports to take, the oldest are dropped. `listener` does not wait for the host to take
    them.
    """

    def __init__(
        self,
        call_host: CallHost,
        buffer: int = DEFAULT_BUFFER,
        listener: Listener | None = None,
    ) -> None:
        self._call_host, self._listener = call_host, listener
        self._reports: deque[SyncReport] = deque(maxlen=buffer)
        self._unheard: deque[SyncReport] = deque(maxlen=buffer if listener else 0)
        self._dropped = 0
        self._lock = threading.Lock()  # of reports and dropped; nothing is awaited under it
        self._state = WatchState()
        self._waking = False  # whether the host is being woken already
        self._wake = anyio.Event()
        # When the sync under way began, and its last sign of life: by time.monotonic(), the last
        # one by time.time() as well.
        self._began: float | None = None
        self._alive_at = self._alive_since = 0.0
        self._last_progress: float | None = None

    def alive(self) -> None:
        """Show a sign of life: a sync begins, or gets on."""
        now = time.monotonic()
        self._alive_at, self._alive_since = now, time.time()
        if self._began is None:
            self._began = now  # last: whoever sees it must see the sign of life, too
        elif now - self._began >= STUCK_SECONDS:
            self._last_progress = self._alive_since

    def tell(self, state: WatchState, report: SyncReport | None) -> None:
        """Tell of a sync that has ended, and what came of it if that is worth telling.

        RuntimeError is raised if the host's loop is closed, which ends the bridge.
        """
        self.alive()
        self._began = None
        self._state = state
        if report is not None:
            with self._lock:
                self._dropped += len(self._reports) == self._reports.maxlen
                self._reports.append(report)
            self._unheard.append(report)
        if not self._waking:
            self._waking = True
            self._call_host(self.wake)

    def wake(self) -> None:
        """Wake whoever waits, and let the listener hear what is new."""
        # Reset before the reports are taken: one that comes later asks for another call.
        self._waking = False
        self._wake.set()
        if self._listener is not None:
            while self._unheard:
                report = self._unheard.popleft()
                self._listener.hear(self.state, report.result, report.timings)
            self._listener.hear(self.state)

    async def wait(self) -> bool:
        """Wait for news from the bridge; return False if none came for `STUCK_SECONDS`."""
        wake = self._wake
        silence = time.monotonic() - self._alive_at if self._began is not None else 0.0
        patience = STUCK_SECONDS - silence if silence < STUCK_SECONDS else STUCK_SECONDS
        with anyio.move_on_after(patience):
            await wake.wait()
        if not wake.is_set():
            return False
        if wake is self._wake:  # somebody else who waits may have been first
            self._wake = anyio.Event()
        return True

    def take(self) -> SyncReport | None:
        """Take the oldest report that is left; None if there is none."""
        with self._lock:
            return self._reports.popleft() if self._reports else None

    @property
    def takes_long(self) -> bool:
        """Whether a sync has been under way for `STUCK_SECONDS`."""
        began = self._began
        return began is not None and time.monotonic() - began >= STUCK_SECONDS

    @property
    def state(self) -> WatchState:
        """The latest state from the bridge, and whether it has been stuck since then."""
        began, silence = self._began, time.monotonic() - self._alive_at
        stuck = began is not None and silence >= STUCK_SECONDS
        return dataclasses.replace(
            self._state,
            last_progress=self._last_progress,
            stuck_since=self._alive_since if stuck else None,
            reports_dropped=self._dropped,
        )


class Service(BridgeThread[NoReturn]):
    """A bridge in a thread of its own, which `run` and `watch` have in common."""

    def __init__(
        self,
        settings: Settings,
        buffer: int = DEFAULT_BUFFER,
        host: HostConnection | None = None,
        listener: Listener | None = None,
    ) -> None:
        if listener is not None and listener.settings != settings:
            raise ValueError("control was made with other settings than the bridge")
        super().__init__(self._serve)
        self._settings, self._listener = settings, listener
        self._listening = contextlib.ExitStack()
        self._was_refused = False
        self.border = Border(self.call_host, buffer, listener)
        self._bridge = Bridge(settings, self.border, self.call, host)
        self.sync_now = self._bridge.sync_now

    async def __aenter__(self) -> Self:
        if self._listener is not None:
            self._listening.enter_context(self._listener.connected(lambda: self.border.state))
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *error: object) -> None:
        with self._listening:
            await super().__aexit__(exc_type, *error)

    async def news(self) -> bool:
        """Start the bridge if need be, and wait for news from it, as `Border.wait`.

        If there is no thread or descriptor for it, that is the news; the next call tries again.
        What has ended the bridge is raised.
        """
        if self.ended.is_set() and not self.stopped:
            await self.outcome()
        if self._was_refused and not self.started:
            await anyio.sleep(self._settings.sweep_interval)
        if self.stopped:
            return False
        if not self.started:
            try:
                self.start()
            except OSError as exc:
                self._was_refused = True
                result = out_of_resources(self._settings, "start", exc)
                self.border.tell(self.border.state, SyncReport(result=result))
        return await self.border.wait()

    async def _serve(self) -> NoReturn:
        await self._bridge.run()

    def _end(self) -> None:
        super()._end()
        self.border.wake()


class Results:
    """The results of a running bridge; made by `watch`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def dropped(self) -> int:
        """Results that the host was too slow for."""
        return self.state.reports_dropped

    @property
    def state(self) -> WatchState:
        """How the bridge watches."""
        return self._service.border.state

    def sync_now(self) -> None:
        """Have the bridge sync and compare at once; from any thread."""
        self._service.sync_now()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> PersistResult:
        """Return the next result, in order, until the context is left.

        While the machine has no thread for the bridge, that is the result, and asking for the next
        one tries again.
        """
        while True:
            report = self._service.border.take()
            if report is not None and report.result is not None:
                return report.result
            if self._service.stopped:
                raise StopAsyncIteration
            await self._service.news()


def watch(
    settings: Settings,
    *,
    buffer: int = DEFAULT_BUFFER,
    connection: Lendable | None = None,
    lock: Lock | None = None,
    control: Listener | None = None,
) -> AbstractAsyncContextManager[Results]:
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
        connection: as for `run`.
        lock: as for `run`.
        control: as for `run`.

    """
    if buffer < 1:
        raise ValueError(f"buffer must be at least 1, got {buffer}")
    require_both(connection, lock)
    return _watching(settings, buffer, connection, lock, control)


@contextlib.asynccontextmanager
async def _watching(
    settings: Settings,
    buffer: int,
    connection: Lendable | None,
    lock: Lock | None,
    control: Listener | None,
) -> AsyncIterator[Results]:
    async with Service(settings, buffer, lent(connection, lock), control) as service:
        results = Results(service)
        await service.news()
        # The first sync is done, or may never be.
        while service.started and not (results.state.last_sync or results.state.stuck_since):
            await service.news()
        yield results
