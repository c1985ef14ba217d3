"""The bridge's own loop: one sync after the other, and what a failure means for the next one."""

from __future__ import annotations

import math
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn

import anyio

from mbcap_watch.bridge.sync import Syncer
from mbcap_watch.errors import (
    DatabaseBusy,
    DatabaseError,
    ForeignWal,
    SnapshotError,
    SnapshotMalformed,
    SnapshotNotFound,
    SnapshotUnreadable,
)
from mbcap_watch.watcher.scheduler import Scheduler
from mbcap_watch.watcher.supervisor import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from mbcap_watch.bridge.lent import HostConnection
    from mbcap_watch.bridge.report import SyncReport
    from mbcap_watch.bridge.service import Border
    from mbcap_watch.results import Reason
    from mbcap_watch.settings import Settings

# The first pause before something is tried again, and the longest while the database is busy.
_FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 1.0

# Whose the `-wal` is may be asked every second: asking takes no lock and reads nothing.
_WAL_PAUSE: Final = 1.0

# An event takes a millisecond from the kernel to the scheduler, on a busy machine perhaps 100.
_EVENT_SECONDS: Final = 0.5


class Bridge:
    """Watches, syncs and reports, until it is cancelled.

    `call` has a function called in the bridge's loop, from any thread and without waiting.
    """

    def __init__(
        self,
        settings: Settings,
        border: Border,
        call: Callable[[Callable[[], None]], None],
        host: HostConnection | None,
    ) -> None:
        self._settings = settings
        self._border = border
        self._call = call
        self._scheduler = Scheduler(settings, time.monotonic())
        self._watch = Watch(settings, partial(self._tell_scheduler, self._scheduler.notify))
        self._syncer = Syncer(settings, border.alive, host=host)
        self._wake = anyio.Event()
        self._error: Exception | None = None  # of the last sync
        self._attempt = 0
        self._busy_since: float | None = None

    def sync_now(self) -> None:
        """Ask for a sync, from any thread."""
        self._tell_scheduler(self._scheduler.request)

    def _tell_scheduler(self, tell: Callable[[float], None]) -> None:
        at = time.monotonic()

        def tell_and_wake() -> None:
            tell(at)
            self._wake.set()

        self._call(tell_and_wake)

    async def run(self) -> NoReturn:
        """Sync for one reason after the other."""
        try:
            reason: Reason = "start"
            while True:
                await self._serve(reason)
                reason = await self._next_reason()
        finally:
            self._syncer.close()
            self._watch.close()

    async def _next_reason(self) -> Reason:
        while True:
            at, reason = self._scheduler.next(polling=self._watch.polling)
            if at <= time.monotonic():
                return reason
            await self._sleep_until(at)

    async def _sleep_until(self, deadline: float) -> None:
        """Return at the deadline, or when the scheduler has been told something."""
        self._wake = anyio.Event()
        with anyio.CancelScope(deadline=deadline):
            await self._wake.wait()

    async def _serve(self, reason: Reason) -> None:
        """Sync for `reason`, tell what came of it, and decide when to sync next."""
        self._border.alive()
        scheduler, watch = self._scheduler, self._watch
        unnoticed = reason == "sweep" and not scheduler.pending and not watch.polling
        armed_since = watch.state.armed_since
        scheduler.begin(reason, time.monotonic())
        refresh = reason in ("start", "sweep") or watch.awaits_directory
        only_if_changed = reason in ("poll", "sweep") or (
            reason == "retry" and isinstance(self._error, SnapshotError)
        )
        report = await self._syncer.sync(
            reason,
            before_reading=watch.refresh if refresh else lambda: None,
            only_if_changed=only_if_changed,
            trust_stat=reason == "sweep" and watch.sees_every_change,
        )
        self._error = report.error
        # No event tells that it is gone, nor what is in a directory that was not watched before.
        unnoticed = unnoticed and watch.state.armed_since == armed_since
        if unnoticed and report.is_new and not isinstance(report.error, SnapshotNotFound):
            await self._count_sweep_hit(time.time())
        watch.update(
            last_sync=time.time(),
            read_errors=watch.state.read_errors + isinstance(report.error, SnapshotUnreadable),
        )
        scheduler.end(
            time.monotonic(),
            idle=report.result is None,
            compared=report.timings is not None,
            retry_in=self._retry_in(reason, report),
        )
        self._border.tell(watch.state, report if self._is_worth_telling(report) else None)

    async def _count_sweep_hit(self, at: float) -> None:
        """Count a change that the watch did not tell of; its event may only be on its way."""
        if not self._scheduler.pending:
            await self._sleep_until(time.monotonic() + _EVENT_SECONDS)
        if not self._scheduler.pending:
            hits = self._watch.state.sweep_hits + 1
            self._watch.update(sweep_hits=hits, last_sweep_hit=at)

    def _retry_in(self, reason: Reason, report: SyncReport) -> float | None:
        """Return the seconds until the next retry; None keeps a retry that is planned."""
        if report.result is None and reason != "retry":
            return None
        if reason != "retry":
            self._attempt = 0
        error, attempt = report.error, self._attempt
        self._attempt += 1
        if isinstance(error, DatabaseBusy) or report.owes_checkpoint:
            return busy_pause(attempt)
        if isinstance(error, DatabaseError):
            pause = _WAL_PAUSE if isinstance(error, ForeignWal) else math.inf
            return min(pause, self._settings.sweep_interval)
        if isinstance(error, (SnapshotMalformed, SnapshotUnreadable)):
            # A torn file is repaired without a rename. The pauses grow until the sweep, or the
            # poll, is soon enough.
            return _growing(_FIRST_PAUSE, attempt, self._settings.sweep_interval)
        growing: float | None = None
        if error is None and report.result is not None and report.result.error:
            # A table still waits for its columns, or a row was refused: that may change soon, or
            # never. The pauses grow until the resync is soon enough.
            growing = _growing(self._settings.sweep_interval, attempt, self._settings.resync)
        due_in = report.due and max(0.0, report.due - time.monotonic())
        return min((each for each in (growing, due_in) if each is not None), default=None)

    def _is_worth_telling(self, report: SyncReport) -> bool:
        """A busy database is normal: it is reported only after `busy_deadline`."""
        if report.result is None:
            return False
        if report.result.outcome != "busy":
            self._busy_since = None
            return True
        now = time.monotonic()
        if self._busy_since is None:
            self._busy_since = now
        if now - self._busy_since < self._settings.busy_deadline:
            return False
        self._busy_since = now
        return True


def busy_pause(attempt: int) -> float:
    """Return a growing pause with jitter, so that two waiters do not meet again and again."""
    pause = _growing(_FIRST_PAUSE, attempt, LONGEST_PAUSE) or LONGEST_PAUSE
    return pause * random.uniform(0.5, 1.0)


def _growing(first: float, attempt: int, longest: float) -> float | None:
    """Return a pause that doubles with each attempt; None once it is as long as `longest`."""
    pause = first * 2.0 ** min(attempt, 30)
    return pause if pause < longest else None
