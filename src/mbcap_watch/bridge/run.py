"""`run`, `persist_once` and `preview_once`: the host's side of the bridge."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import anyio

from mbcap_watch.bridge.border import DEFAULT_BUFFER, Border
from mbcap_watch.bridge.loop import LONGEST_PAUSE, Bridge, busy_pause
from mbcap_watch.bridge.report import describe
from mbcap_watch.bridge.sync import Syncer
from mbcap_watch.bridge.thread import BridgeThread
from mbcap_watch.bridge.trigger import Trigger
from mbcap_watch.errors import DatabaseFailed
from mbcap_watch.store.reconcile import Tally

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import NoReturn

    from anyio.abc import TaskStatus

    from mbcap_watch.bridge.sync import OnProgress
    from mbcap_watch.results import PersistResult, Reason, Timings, WatchState
    from mbcap_watch.settings import Settings
    from mbcap_watch.store.plan import Change

OnResult: TypeAlias = "Callable[[PersistResult], Any]"
OnState: TypeAlias = "Callable[[WatchState], Any]"
OnTimings: TypeAlias = "Callable[[Timings], Any]"
T = TypeVar("T")

logger = logging.getLogger("mbcap_watch")


async def persist_once(
    settings: Settings, *, on_progress: OnProgress | None = None
) -> PersistResult:
    """Sync once: read the snapshot and apply it.

    Tries a busy database until `busy_deadline`, and waits as long as `wal_grace` says for a `-wal`
    that was left behind.

    Never raises for the state of the files: the result's `outcome` and `error` tell. What the hook
    raises is raised once the sync has ended.

    Args:
        settings: what to sync, and how.
        on_progress: called from another thread after every few thousand rows, with how many of
            the snapshot's keys were found and seen to, and how many there are.

    Raises:
        EventLoopError: no asyncio or trio runs here.

    """
    errors: list[Exception] = []

    def tell(done: int, total: int) -> None:
        if on_progress is not None and not errors:
            try:
                on_progress(done, total)
            except Exception as exc:  # noqa: BLE001 - it is raised below; no state of files is to blame
                errors.append(exc)

    syncer = Syncer(settings, on_progress=tell)

    async def persist() -> tuple[PersistResult, None]:
        report = await syncer.sync("once")
        for error in errors:
            raise error
        assert report.result is not None
        return report.result, None

    result, _ = await _until_not_busy(settings, syncer, persist)
    return result


async def preview_once(settings: Settings) -> tuple[PersistResult, list[tuple[str, Change]]]:
    """Return what `persist_once` would report, and by table what it would change; change nothing.

    Raises:
        EventLoopError: no asyncio or trio runs here.

    """
    syncer = Syncer(settings)

    async def compare() -> tuple[PersistResult, list[tuple[str, Change]]]:
        return syncer.preview()

    result, changes = await _until_not_busy(settings, syncer, compare)
    return result, changes or []


async def _until_not_busy(
    settings: Settings, syncer: Syncer, sync: Callable[[], Awaitable[tuple[PersistResult, T]]]
) -> tuple[PersistResult, T | None]:
    async def repeat() -> tuple[PersistResult, T]:
        started, attempt, waiting = time.monotonic(), 0, False
        while True:
            answer = await sync()
            result, pause = answer[0], busy_pause(2.0 ** min(attempt, 10))
            patience = settings.busy_deadline
            if result.cause == "wal_left_behind":
                patience += settings.wal_grace + LONGEST_PAUSE
            spent = time.monotonic() + pause - started
            if result.outcome not in ("busy", "foreign_wal") or spent > patience:
                return answer
            if result.outcome == "foreign_wal" and not waiting:
                waiting = True
                logger.warning("waiting: %s", result.error)
            await anyio.sleep(pause)
            attempt += 1

    async def repeat_and_close() -> tuple[PersistResult, T]:
        with contextlib.closing(syncer):
            return await repeat()

    thread = BridgeThread(repeat_and_close)
    try:
        thread.start()
    except OSError as exc:
        return out_of_resources(settings, "once", exc), None
    async with thread:
        return await thread.outcome()


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
    the first sync is done. Whatever happens to the files, the bridge waits and syncs again; it
    raises only for programming errors, those of the hooks included. Cancelled in the middle of a
    sync, it waits for the batch under way; the result of that sync is not told any more.

    The hooks are called in the host's loop, one after the other; each may be a coroutine function,
    and then holds up later hooks until it returns, but never a sync. When the host does not keep
    up, the oldest reports are dropped, and counted in the `WatchState`.

    Args:
        settings: what to watch, and how.
        on_result: called with every `PersistResult`.
        on_state: called with the `WatchState` after every sync, when the filesystem stops
            answering, and every few seconds during a long sync.
        on_timings: called with the `Timings` of every sync that compared the database.
        trigger: lets the host say "sync now".
        task_status: for `TaskGroup.start`.

    Raises:
        EventLoopError: no asyncio or trio runs here.

    """
    service = Service(settings)
    while (result := service.start()) is not None:
        await _call(on_result, result)
        await service.pause()
    border, thread, started = service.border, service.thread, False
    async with thread:
        with (trigger or Trigger()).connected(service.sync_now):
            while True:
                woken = await border.wait()
                while (report := border.take()) is not None:
                    await _call(on_result, report.result)
                    await _call(on_timings, report.timings)
                if thread.ended.is_set():
                    await thread.outcome()
                if woken or border.takes_long:
                    await _call(on_state, border.state)
                if woken and not started:
                    started = True
                    task_status.started()


class Service:
    """A bridge in a thread of its own, which `run` and `watch` have in common."""

    def __init__(self, settings: Settings, buffer: int = DEFAULT_BUFFER) -> None:
        self._settings = settings
        self.thread: BridgeThread[NoReturn] = BridgeThread(self._run)
        self.border = Border(self.thread.call_host, buffer)
        self.thread.on_ended = self.border.wake
        self._bridge = Bridge(settings, self.border, self.thread.call)
        self.sync_now = self._bridge.sync_now

    def start(self) -> PersistResult | None:
        """Start it; return what to report if there is no thread or no descriptor for it now."""
        try:
            self.thread.start()
        except OSError as exc:
            return out_of_resources(self._settings, "start", exc)
        return None

    async def pause(self) -> None:
        """Wait before it is started again."""
        await anyio.sleep(self._settings.sweep_interval)

    async def _run(self) -> NoReturn:
        await self._bridge.run()


def out_of_resources(settings: Settings, reason: Reason, error: OSError) -> PersistResult:
    """Return the result of a sync for which there was no thread or no descriptor."""
    problem = f"cannot be served now: {error.strerror}"
    return describe(
        reason, None, None, Tally(), DatabaseFailed(settings.database, problem, "limit"), 0.0
    )


async def _call(hook: Callable[[T], Any] | None, value: T | None) -> None:
    if hook is not None and value is not None:
        answer = hook(value)
        if inspect.isawaitable(answer):
            await answer
