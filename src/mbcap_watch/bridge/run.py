"""`run`, `persist_once` and `preview_once`: what hosts and the command line call."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import anyio

from mbcap_watch.bridge.lent import lent
from mbcap_watch.bridge.loop import LONGEST_PAUSE, busy_pause
from mbcap_watch.bridge.report import out_of_resources
from mbcap_watch.bridge.service import Service
from mbcap_watch.bridge.sync import Syncer
from mbcap_watch.bridge.thread import BridgeThread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from anyio.abc import TaskStatus

    from mbcap_watch.bridge.host import Lock
    from mbcap_watch.bridge.lent import Lendable
    from mbcap_watch.bridge.service import Listener
    from mbcap_watch.bridge.sync import OnProgress
    from mbcap_watch.results import PersistResult, Timings, WatchState
    from mbcap_watch.settings import Settings
    from mbcap_watch.store.plan import Change

T = TypeVar("T")
Hook: TypeAlias = "Callable[[T], Any] | None"

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
        on_progress: called from another thread after every few thousand rows, with two numbers:
            the snapshot's keys that are done, and all that are to be written or compared.

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

    async def persist() -> PersistResult:
        report = await syncer.sync("once")
        for error in errors:
            raise error
        assert report.result is not None
        return report.result

    return await _until_not_busy(settings, syncer, persist)


async def preview_once(settings: Settings) -> tuple[PersistResult, list[tuple[str, Change]]]:
    """Return what `persist_once` would report, and by table what it would change; change nothing.

    Raises:
        EventLoopError: no asyncio or trio runs here.

    """
    syncer, changes = Syncer(settings), list[tuple[str, "Change"]]()

    async def compare() -> PersistResult:
        result, changes[:] = syncer.preview()
        return result

    return await _until_not_busy(settings, syncer, compare), changes


async def _until_not_busy(
    settings: Settings, syncer: Syncer, sync: Callable[[], Awaitable[PersistResult]]
) -> PersistResult:
    async def repeat() -> PersistResult:
        started, attempt, waiting = time.monotonic(), 0, False
        while True:
            result, pause = await sync(), busy_pause(attempt)
            patience = settings.busy_deadline
            if result.cause == "wal_left_behind":
                patience += settings.wal_grace + LONGEST_PAUSE
            spent = time.monotonic() + pause - started
            if result.outcome not in ("busy", "foreign_wal") or spent > patience:
                return result
            if result.outcome == "foreign_wal" and not waiting:
                waiting = True
                logger.warning("waiting: %s", result.error)
            await anyio.sleep(pause)
            attempt += 1

    async def repeat_and_close() -> PersistResult:
        with contextlib.closing(syncer):
            return await repeat()

    thread = BridgeThread(repeat_and_close)
    try:
        thread.start()
    except OSError as exc:
        return out_of_resources(settings, "once", exc)
    async with thread:
        return await thread.outcome()


class Trigger:
    """Asks running bridges for a sync: `run(settings, trigger=trigger)`, `trigger.sync_now()`."""

    def __init__(self) -> None:
        self._requests: list[Callable[[], None]] = []

    def sync_now(self) -> None:
        """Have every bridge with this trigger sync and compare at once; from any thread.

        A sync costs a comparison with the database; calls within `debounce` of one merge into one
        more. Does not wait: what comes of it goes to `on_result`, with the reason `request`. A
        bridge that does not run yet syncs when it starts.
        """
        for request in tuple(self._requests):
            request()

    @contextlib.contextmanager
    def connected(self, request: Callable[[], None]) -> Iterator[None]:
        """Have `sync_now` call `request` for as long as the context lasts."""
        self._requests.append(request)
        try:
            yield
        finally:
            self._requests.remove(request)


async def run(
    settings: Settings,
    *,
    on_result: Hook[PersistResult] = None,
    on_state: Hook[WatchState] = None,
    on_timings: Hook[Timings] = None,
    trigger: Trigger | None = None,
    connection: Lendable | None = None,
    lock: Lock | None = None,
    control: Listener | None = None,
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
        connection: of a host that stays the only writer: rows are read and written through it, in
            the host's loop, and nothing of it is changed. No file of the database is opened then.
            Or a function that returns the current one, or None while there is none, called in the
            host's loop under `lock`.
        lock: what the host holds whenever it uses `connection`, such as an `asyncio.Lock`. It is
            taken for each page that is read and each batch that is written, and free in between.
        control: `Control(settings)` lets `mbcap-watch status`, `check` and `top` see this bridge.
        task_status: for `TaskGroup.start`.

    Raises:
        EventLoopError: no asyncio or trio runs here, or, with `connection` or `control`, no
            asyncio.
        TypeError: `connection` was given without `lock`, or the reverse, or cannot be used.
        ValueError: `control` was made with other settings.
        RuntimeError: `control` serves another bridge already.

    """
    is_up = False
    async with Service(settings, host=lent(connection, lock), listener=control) as service:
        border = service.border
        with (trigger or Trigger()).connected(service.sync_now):
            while True:
                woken = await service.news()
                while (report := border.take()) is not None:
                    await _call(on_result, report.result)
                    await _call(on_timings, report.timings)
                if not service.started or service.ended.is_set():
                    continue
                if woken or border.takes_long:
                    await _call(on_state, border.state)
                if woken and not is_up:
                    is_up = True
                    task_status.started()


async def _call(hook: Hook[T], value: T | None) -> None:
    if hook is not None and value is not None:
        answer = hook(value)
        if inspect.isawaitable(answer):
            await answer
