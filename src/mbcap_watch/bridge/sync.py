"""One sync: load the snapshot, compare, write what differs, and report what came of it."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from mbcap_watch.bridge.host import HOST_BATCH_ROWS, HOST_PAGES
from mbcap_watch.bridge.loading import (
    Fingerprint,
    LoadedSnapshot,
    Stamp,
    database_stamp,
    load,
    settled,
)
from mbcap_watch.bridge.report import Error, SyncReport, Unforeseen, describe
from mbcap_watch.bridge.spot import SpotCheck, Values
from mbcap_watch.errors import (
    DatabaseBusy,
    DatabaseError,
    EventLoopError,
    SnapshotUnreadable,
)
from mbcap_watch.results import PersistResult, Reason, Timings
from mbcap_watch.store import plan
from mbcap_watch.store.connection import open_database
from mbcap_watch.store.descriptors import release
from mbcap_watch.store.reader import open_to_read
from mbcap_watch.store.reconcile import PAGES, Tally, reconcile
from mbcap_watch.store.steps import preview_steps, run_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from mbcap_watch.bridge.lent import HostConnection
    from mbcap_watch.settings import Settings
    from mbcap_watch.store.steps import Steps

OnProgress: TypeAlias = "Callable[[int, int], object]"

# The desired state is kept up to this size of its file (17,000 entries, 4 MB), to write first what
# is new in the next one: without, a rename of 2,400 entries takes half as long again to be seen.
KEPT_BYTES: Final = 2 << 20

DELTA_SHARE: Final = 4  # above one new entry in so many, writing them first saves nothing


class _Attempt(NamedTuple):  # to apply a snapshot, in one sync or more
    tally: Tally
    started: float


class Syncer:
    """Syncs one database with one snapshot, and remembers what it has seen of the files.

    `alive` is called whenever a sync gets on, `on_progress` as `persist_once` says. With `host`,
    rows are read and written through its connection, and no file of the database is opened.
    """

    def __init__(
        self,
        settings: Settings,
        alive: Callable[[], None] = lambda: None,
        on_progress: OnProgress = lambda *_: None,
        host: HostConnection | None = None,
    ) -> None:
        self._settings = settings
        self._host = host
        self._alive = alive
        self._on_progress = on_progress
        self._unforeseen = Unforeseen(settings)
        self._seen: Fingerprint | None = None
        self._snapshot_stamp: Stamp = None
        self._error: Error | None = None
        self._unfinished: _Attempt | None = None
        self._owes_checkpoint = False
        self._holds = plan.Holds(settings.downgrade_hold)
        self._behind = False  # whether there was a new snapshot since the last full comparison
        self._whole: Fingerprint | None = None  # of the files when every row was last as wanted
        # By time.monotonic(): when the file was last looked at, and when the file before it was
        # last seen. At the start, both are now.
        self._looked_at = self._replaced_after = time.monotonic()
        self._applied: Values | None = None
        self._database_stamp: tuple[Stamp, Stamp] | None = None
        self._spot_check = SpotCheck()

    async def sync(
        self,
        reason: Reason,
        *,
        before_reading: Callable[[], None] = lambda: None,
        only_if_changed: bool = False,
        trust_stat: bool = False,
    ) -> SyncReport:
        """Sync once.

        After `busy`, the next sync goes on where this one stopped, and its result counts the work
        of both.

        Args:
            reason: for the sync.
            before_reading: called before the file is read.
            only_if_changed: whether to do nothing if the files are those of the sync before.
            trust_stat: whether `stat` is enough to tell that they are.

        """
        owed = Tally(owes_checkpoint=self._owes_checkpoint)
        attempt = self._unfinished or _Attempt(owed, time.perf_counter())
        tally = attempt.tally
        self._alive()
        before, looked_at = self._seen, time.monotonic()
        stamp = self._snapshot_stamp if trust_stat else None
        loaded = self._load(before_reading, before if only_if_changed else None, stamp)
        is_known = only_if_changed and loaded.fingerprint == before
        if is_known and reason == "sweep" and await self._is_outdated():
            loaded, is_known = self._load(), False
        now = loaded.fingerprint
        is_new = before is None or before.snapshot != now.snapshot
        if is_new:
            self._behind, self._whole, self._replaced_after = True, None, self._looked_at
        if not isinstance(loaded.error, SnapshotUnreadable):
            self._looked_at = looked_at
        self._seen, self._snapshot_stamp = now, loaded.stamp
        if is_known:
            return SyncReport(result=None, error=self._error)
        was_whole = self._whole == now
        error: Error | None = loaded.error
        timings: Timings | None = None
        if loaded.desired is not None:
            if reason == "once":  # without a memory of earlier snapshots, nothing is lowered
                self._holds = plan.Holds()
            self._holds.read(loaded.desired.values, looked_at)
            error = await self._apply(loaded.desired.values, tally)
            if error is None:
                timings = self._timings(loaded, tally)
                self._applied = loaded.desired.values if loaded.size <= KEPT_BYTES else None
                self._behind = False
                self._whole = None if tally.failed or tally.waiting or tally.held else now
        self._error = error
        self._owes_checkpoint = tally.owes_checkpoint
        self._unfinished = attempt if isinstance(error, DatabaseBusy) else None
        set_back = tally.revalued if was_whole else 0
        return SyncReport(
            result=_result(reason, loaded, attempt, error, set_back),
            timings=timings,
            is_new=is_new,
            error=error,
            owes_checkpoint=tally.owes_checkpoint,
            due=None if error else min(self._holds.waiting, default=None),
        )

    def close(self) -> None:
        """Leave no descriptor behind."""
        if self._host is None:
            release(self._settings.database)

    def preview(self) -> tuple[PersistResult, list[tuple[str, plan.Change]]]:
        """Return what a sync would report and the changes it would make; make none. Blocks."""
        attempt, loaded = _Attempt(Tally(), time.perf_counter()), self._load()
        error: Error | None = loaded.error
        changes: list[tuple[str, plan.Change]] = []
        if loaded.desired is not None:
            try:
                changes = self._preview(self._steps(loaded.desired.values, attempt.tally))
            except Exception as exc:  # noqa: BLE001 - see `Unforeseen`
                error = self._unforeseen.of_database(exc)
        return _result("once", loaded, attempt, error), changes

    def _load(
        self,
        before_reading: Callable[[], None] = lambda: None,
        known: Fingerprint | None = None,
        stamp: Stamp = None,
    ) -> LoadedSnapshot:
        try:
            before_reading()
            return load(self._settings, known, self._alive, stamp)
        except Exception as exc:  # noqa: BLE001 - see `Unforeseen`
            error = self._unforeseen.of_snapshot(exc)
        return LoadedSnapshot(Fingerprint(hash((type(error), str(error))), None), error=error)

    async def _apply(self, values: Values, tally: Tally) -> DatabaseError | None:
        """Make the rows what `values` says; return what went wrong."""
        path = self._settings.database

        def get_on() -> None:
            self._alive()
            self._on_progress(min(tally.matched.total(), tally.wanted), tally.wanted)

        delta = plan.delta(self._applied, values) if self._applied is not None else {}
        if len(delta) * DELTA_SHARE > len(values):
            delta = {}
        # A `-wal` that the last sync left is our own, as long as the files are as it left them.
        stamp = database_stamp(path)
        before = settled(stamp)
        tally.owes_checkpoint &= stamp == self._database_stamp
        grace = 0.0 if tally.owes_checkpoint else self._settings.wal_grace
        opened = self._host.open if self._host is not None else open_database
        try:
            async with opened(path, tally, grace) as database:
                await run_steps(self._steps(values, tally, delta, self._holds), database, get_on)
        except EventLoopError:
            raise  # the host's loop is closed, which ends the bridge
        except Exception as exc:  # noqa: BLE001 - see `Unforeseen`
            return self._unforeseen.of_database(exc)
        finally:
            now = database_stamp(path)
            is_same = now[0] and stamp[0] and now[0][:2] == stamp[0][:2]
            self._database_stamp = now if is_same else None
        self._spot_check.remember(values, tally, before)
        return None

    def _steps(
        self,
        values: Values,
        tally: Tally,
        delta: Values | None = None,
        holds: plan.Holds | None = None,
    ) -> Steps:
        settings, rows, pages = self._settings, self._settings.batch_rows, PAGES
        if self._host is not None:
            rows, pages = min(rows, HOST_BATCH_ROWS), HOST_PAGES
        return reconcile(
            settings.database,
            values,
            tally,
            delta=delta,
            batch_rows=rows,
            downgrade=settings.downgrade,
            holds=holds,
            pages=pages,
        )

    def _preview(self, steps: Steps) -> list[tuple[str, plan.Change]]:
        with open_to_read(self._settings.database, self._settings.wal_grace) as (connection, _):
            return preview_steps(steps, connection)

    async def _is_outdated(self) -> bool:
        """Whether the spot check finds that rows differ again."""
        path, tally = self._settings.database, Tally()
        stamp = database_stamp(path)
        if self._error or not self._spot_check.is_due(stamp):
            return False
        downgrade = self._settings.downgrade
        steps = self._spot_check.steps(self._steps, tally, self._applied, downgrade)
        try:
            if self._host is None:
                changes = self._preview(steps)
            else:
                changes = await self._host.preview(path, steps)
        except DatabaseBusy:
            return False  # the next sweep asks again
        except Exception:  # noqa: BLE001 - a full sync says what it is
            return True
        return self._spot_check.finds_any(changes, tally, self._applied, stamp)

    def _timings(self, loaded: LoadedSnapshot, tally: Tally) -> Timings:
        lag = None
        if self._behind and loaded.changed_at and tally.committed_at and tally.changed.total():
            since_commit = time.time() - tally.committed_at
            longest = time.monotonic() - since_commit - self._replaced_after
            lag = min(tally.committed_at - loaded.changed_at, longest)
        return Timings(
            lag=lag if lag is None or lag >= 0 else None,
            waits=tuple(tally.waits),
            holds=tuple(tally.holds),
        )


def _result(
    reason: Reason,
    loaded: LoadedSnapshot,
    attempt: _Attempt,
    error: Error | None,
    set_back: int = 0,
) -> PersistResult:
    seconds = time.perf_counter() - attempt.started
    result = describe(
        reason, attempt.tally, error, seconds, loaded.desired, loaded.written_at, set_back
    )
    if result.outcome == "no_snapshot" and loaded.fingerprint.database is None:
        # A wrong path of the database moves the directory of the snapshot along.
        return dataclasses.replace(result, cause="no_database")
    return result
