"""`persist_once` and `run`: the whole chain, from "look again" to a result."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, TypeVar

import anyio

from mbcap_watch.agenda import Agenda
from mbcap_watch.errors import (
    DatabaseBusy,
    DatabaseError,
    ForeignWal,
    SnapshotError,
    SnapshotMalformed,
    SnapshotUnreadable,
)
from mbcap_watch.look import Looker
from mbcap_watch.tasks import require_asyncio
from mbcap_watch.trigger import Trigger
from mbcap_watch.watcher import Watch
from mbcap_watch.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskStatus

    from mbcap_watch.look import OnProgress
    from mbcap_watch.plan import Change
    from mbcap_watch.result import PersistResult, Reason, Timings, WatchState
    from mbcap_watch.settings import Settings

OnResult: TypeAlias = "Callable[[PersistResult], Any]"
OnState: TypeAlias = "Callable[[WatchState], Any]"
OnTimings: TypeAlias = "Callable[[Timings], Any]"
T = TypeVar("T")

logger = logging.getLogger("mbcap_watch")

# The first pause before something is tried again, and the longest while the database is busy.
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0

# Asking whose the `-wal` is takes no lock and reads nothing.
_WAL_PAUSE: Final = 1.0


async def persist_once(
    settings: Settings, *, on_progress: OnProgress | None = None
) -> PersistResult:
    """Look once: read the snapshot and apply it.

    Tries a busy database until `busy_deadline`, and waits as long as `wal_grace` says for a `-wal`
    that was left behind.

    Never raises for the state of the files: the result's `outcome` and `error` tell.

    Args:
        settings: what to look at, and how.
        on_progress: called from another thread after every few thousand rows, with how many of
            the snapshot's keys were found and seen to, and how many there are.

    Raises:
        EventLoopError: not running on asyncio.

    """
    result, _ = await _until_not_busy(settings, Looker.persist, on_progress)
    return result


async def preview_once(settings: Settings) -> tuple[PersistResult, list[tuple[str, Change]]]:
    """Return what `persist_once` would report, and by table what it would change; change nothing.

    Raises:
        EventLoopError: not running on asyncio.

    """
    return await _until_not_busy(settings, Looker.preview)


async def _until_not_busy(
    settings: Settings,
    look: Callable[[Looker], Awaitable[tuple[PersistResult, T]]],
    on_progress: OnProgress | None = None,
) -> tuple[PersistResult, T]:
    loop = require_asyncio()
    started, waiting = loop.time(), False
    async with Worker() as worker:
        looker = Looker(settings, worker, on_progress)
        attempt = 0
        while True:
            answer = await look(looker)
            result, pause = answer[0], _busy_pause(2.0 ** min(attempt, 10))
            patience = settings.busy_deadline
            if result.cause == "wal_left_behind":
                patience += settings.wal_grace + _LONGEST_PAUSE
            spent = loop.time() + pause - started
            if result.outcome not in ("busy", "foreign_wal") or spent > patience:
                return answer
            if result.outcome == "foreign_wal" and not waiting:
                waiting = True
                logger.warning("waiting: %s", result.error)
            await anyio.sleep(pause)
            attempt += 1


async def run(
    settings: Settings,
    *,
    on_result: OnResult | None = None,
    on_state: OnState | None = None,
    on_timings: OnTimings | None = None,
    trigger: Trigger | None = None,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Bridge snapshots into the database until cancelled.

    Under `await task_group.start(run, settings)` the start is over once the watch is armed and
    the first look is done. Whatever happens to the files, the bridge waits and looks again; it
    raises only for programming errors, those of the hooks included. Cancelled in the middle of a
    look, it waits for the batch under way; the result of that look is not told any more.

    Args:
        settings: what to watch, and how.
        on_result: called with every `PersistResult`; may be a coroutine function, and then holds
            up the next look until it returns.
        on_state: called with the `WatchState` after every look, when the filesystem stops
            answering, and every few seconds during a long look; likewise.
        on_timings: called with the `Timings` of every look that compared the database; likewise.
        trigger: lets the host say "look now".
        task_status: for `TaskGroup.start`.

    Raises:
        EventLoopError: not running on asyncio.

    """
    loop = require_asyncio()
    agenda = Agenda(settings, loop.time())
    bell = asyncio.Event()

    def ring() -> None:
        agenda.ring(loop.time())
        bell.set()

    def request() -> None:
        agenda.request(loop.time())
        bell.set()

    def from_thread(callback: Callable[[], None]) -> None:
        try:
            loop.call_soon_threadsafe(callback)
        except RuntimeError:
            return  # the loop was closed under a host that did not wait for us

    async def on_stuck(since: float | None) -> None:
        await bridge.note_stuck(since)

    async with Worker(on_stuck) as worker:
        watch = Watch(settings, worker, partial(from_thread, ring))
        hooks = _Hooks(on_result, on_state, on_timings)
        bridge = _Bridge(settings, agenda, watch, Looker(settings, worker), hooks)
        await bridge.serve("start")
        with (trigger or Trigger()).connected(partial(from_thread, request)):
            task_status.started()
            while True:
                await bridge.serve(await _next_reason(agenda, watch, bell))


async def _next_reason(agenda: Agenda, watch: Watch, bell: asyncio.Event) -> Reason:
    loop = asyncio.get_running_loop()
    while True:
        at, reason = agenda.next(polling=watch.polling)
        if at <= loop.time():
            return reason
        bell.clear()
        alarm = loop.call_at(at, bell.set)
        try:
            await bell.wait()
        finally:
            alarm.cancel()


class _Hooks(NamedTuple):
    on_result: OnResult | None
    on_state: OnState | None
    on_timings: OnTimings | None


class _Bridge:
    """Serves one reason to look after the other, and decides what a failure means."""

    def __init__(
        self,
        settings: Settings,
        agenda: Agenda,
        watch: Watch,
        looker: Looker,
        hooks: _Hooks,
    ) -> None:
        self._settings = settings
        self._agenda = agenda
        self._watch = watch
        self._looker = looker
        self._hooks = hooks
        self._attempt = 0
        self._busy_since: float | None = None

    async def serve(self, reason: Reason) -> None:
        """Look for `reason`, tell what came of it, and put down when to look next."""
        now = asyncio.get_running_loop().time
        missed = reason == "sweep" and not self._agenda.ringing and not self._watch.polling
        self._agenda.begin(reason, now())
        refresh = reason in ("start", "sweep") or self._watch.awaits_directory
        only_if_changed = reason in ("poll", "sweep") or (
            reason == "retry" and isinstance(self._looker.error, SnapshotError)
        )
        look = self._looker.look_if_changed if only_if_changed else self._looker.look
        # In one call to the thread: that halves what an idle bridge takes.
        result = await look(reason, first=self._watch.refresh if refresh else None)
        self._note_look(result, missed=missed)
        compared = result is not None and result.outcome in ("applied", "unchanged")
        retry_in = self._retry_in(reason, result)
        self._agenda.end(now(), idle=result is None, compared=compared, retry_in=retry_in)
        if result is not None and self._worth_telling(result, now()):
            await _call(self._hooks.on_result, result)
        if self._looker.timings is not None:
            await _call(self._hooks.on_timings, self._looker.timings)
        await _call(self._hooks.on_state, self._watch.state)

    async def note_stuck(self, since: float | None) -> None:
        """Tell that the filesystem does not answer, or that a call goes on."""
        if since is None:
            self._watch.update(stuck_since=None, last_progress=time.time())
        else:
            self._watch.update(stuck_since=since)
        await _call(self._hooks.on_state, self._watch.state)

    def _note_look(self, result: PersistResult | None, *, missed: bool) -> None:
        state = self._watch.state
        missed = missed and result is not None and self._looker.snapshot_changed
        self._watch.update(
            last_look=time.time(),
            sweep_hits=state.sweep_hits + missed,
            read_errors=state.read_errors + isinstance(self._looker.error, SnapshotUnreadable),
        )

    def _retry_in(self, reason: Reason, result: PersistResult | None) -> float | None:
        """Decide: wait (None, which leaves alone what is put down), retry soon, or slowly."""
        if result is None and reason != "retry":
            return None
        if reason != "retry":
            self._attempt = 0
        error, growth = self._looker.error, 2.0 ** min(self._attempt, 20)
        self._attempt += 1
        if isinstance(error, DatabaseBusy) or self._looker.owes_checkpoint:
            return _busy_pause(growth)
        if isinstance(error, DatabaseError):
            pause = _WAL_PAUSE if isinstance(error, ForeignWal) else math.inf
            return min(pause, self._settings.sweep_interval)
        if isinstance(error, (SnapshotMalformed, SnapshotUnreadable)):
            # A torn file is repaired without a rename. The pauses grow until the sweep, or the
            # poll, is soon enough.
            pause = _FIRST_PAUSE * growth
            return pause if pause < self._settings.sweep_interval else None
        if error is None and result is not None and result.error:
            # A table still waits for its columns, or a row was refused: that may change soon, or
            # never. The pauses grow until the resync is soon enough.
            pause = self._settings.sweep_interval * growth
            return pause if pause < self._settings.resync else None
        return None

    def _worth_telling(self, result: PersistResult, now: float) -> bool:
        """Being busy is normal: it is told only once it has lasted for `busy_deadline`."""
        if result.outcome != "busy":
            self._busy_since = None
            return True
        if self._busy_since is None:
            self._busy_since = now
        if now - self._busy_since < self._settings.busy_deadline:
            return False
        self._busy_since = now
        return True


async def _call(hook: Callable[[T], Any] | None, value: T) -> None:
    if hook is not None:
        answer = hook(value)
        if inspect.isawaitable(answer):
            await answer


def _busy_pause(growth: float) -> float:
    """Return a growing pause with jitter, so that two waiters do not meet again and again."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * growth) * random.uniform(0.5, 1.0)
