"""What the bridge tells the host: reports, the state of the watch, and signs of life."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import anyio

from mbcap_watch.limits import STUCK_SECONDS
from mbcap_watch.results import WatchState

if TYPE_CHECKING:
    from mbcap_watch.bridge.sync import SyncReport
    from mbcap_watch.bridge.thread import CallHost

# Reports kept for a host that does not take them.
DEFAULT_BUFFER: Final = 64


class Border:
    """Carries what the bridge tells to the host's loop, and never holds up either of them.

    Args:
        call_host: has a function called in the host's loop.
        buffer: reports kept for a slow host; when there are more, the oldest are dropped.

    """

    def __init__(self, call_host: CallHost, buffer: int = DEFAULT_BUFFER) -> None:
        self._call_host = call_host
        self._reports: deque[SyncReport] = deque(maxlen=buffer)
        self._dropped = 0
        self._lock = threading.Lock()  # of those two; nothing is awaited under it
        self._state = WatchState()
        self._waking = False  # whether the host is being woken already
        self._wake = anyio.Event()
        # When the sync under way began, and its last sign of life: by time.monotonic(), the last
        # one by time.time() as well.
        self._began: float | None = None
        self._alive_at = self._alive_since = 0.0
        self._last_progress: float | None = None

    # ---- the bridge's side

    def alive(self) -> None:
        """Show a sign of life: a sync begins, or gets on."""
        now = time.monotonic()
        self._alive_at, self._alive_since = now, time.time()
        if self._began is None:
            self._began = now  # last: who sees it has to see the sign of life as well
        elif now - self._began >= STUCK_SECONDS:
            self._last_progress = self._alive_since

    def tell(self, state: WatchState, report: SyncReport | None) -> None:
        """Tell of a sync that has ended, and what came of it if that is worth telling.

        Raises:
            RuntimeError: the host's loop is closed.

        """
        self.alive()
        self._began = None
        self._state = state
        if report is not None:
            with self._lock:
                self._dropped += len(self._reports) == self._reports.maxlen
                self._reports.append(report)
        if not self._waking:
            self._waking = True
            self._call_host(self.wake)

    # ---- the host's side, in its loop

    def wake(self) -> None:
        """Wake whoever waits."""
        self._wake.set()

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
            self._waking = False
        return True

    def take(self) -> SyncReport | None:
        """Take the oldest report that is left; None if there is none."""
        with self._lock:
            return self._reports.popleft() if self._reports else None

    @property
    def dropped(self) -> int:
        """How many reports the host was too slow for."""
        with self._lock:
            return self._dropped

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
            reports_dropped=self.dropped,
        )
