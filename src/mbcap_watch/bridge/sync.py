"""One sync: load the snapshot, compare, write what differs, and report what came of it."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from mbcap_watch.bridge.host import HOST_BATCH_ROWS, HOST_PAGES
from mbcap_watch.bridge.loading import Fingerprint, LoadedSnapshot, Stamp, database_stamp, load
from mbcap_watch.bridge.report import Unforeseen, describe
from mbcap_watch.errors import (
    DatabaseBusy,
    DatabaseError,
    EventLoopError,
    SnapshotError,
    SnapshotUnreadable,
)
from mbcap_watch.results import PersistResult, Reason, Timings
from mbcap_watch.store import plan, wal
from mbcap_watch.store.connection import open_database
from mbcap_watch.store.native import open_to_read
from mbcap_watch.store.reconcile import PAGES, Tally, reconcile
from mbcap_watch.store.steps import Preview, preview_steps, run_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from mbcap_watch.bridge.host import HostConnection
    from mbcap_watch.settings import Settings
    from mbcap_watch.store.steps import Steps

OnProgress: TypeAlias = "Callable[[int, int], object]"
Values: TypeAlias = dict[str, plan.Value]
Error: TypeAlias = SnapshotError | DatabaseError

# The desired state is kept up to this size of its file (17,000 entries, 4 MB), to write first what
# is new in the next one: without, a rename of 2,400 entries takes half as long again to be seen.
KEPT_BYTES: Final = 2 << 20

DELTA_SHARE: Final = 4  # above one new entry in so many, writing them first saves nothing

# Keys that are looked up where the database's files changed, to see whether it was overwritten by
# a backup in place. A full comparison each time would cost what the resync does.
SPOT_CHECKED: Final = 50


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What came of a sync.

    Attributes:
        result: for the host; None if the files are those of the sync before, and nothing was done.
        timings: None if the database was not compared.
        is_new: whether the snapshot is another than that of the sync before.
        error: why the snapshot or the database could not be used; None if both could.
        owes_checkpoint: whether another sync must empty the `-wal` that this one filled.

    """

    result: PersistResult | None
    timings: Timings | None = None
    is_new: bool = False
    error: Error | None = None
    owes_checkpoint: bool = False


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
        self._behind = False  # whether there was a new snapshot since the last full comparison
        self._whole: Fingerprint | None = None  # of the files when every row was last as wanted
        # By time.monotonic(): when the file was last looked at, and when it was last seen to be
        # another one than now. Before the start there was no bridge to see it.
        self._looked_at = self._replaced_after = time.monotonic()
        self._applied: Values | None = None
        self._sample: Values = {}  # of what the last comparison left
        self._database_stamp: tuple[Stamp, Stamp] | None = None

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
        if is_known and reason == "sweep" and await self._was_overwritten():
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
            error = await self._apply(loaded.desired.values, tally)
            if error is None:
                timings = self._timings(loaded, tally)
                self._applied = loaded.desired.values if loaded.size <= KEPT_BYTES else None
                self._behind = False
                self._whole = None if tally.failed or tally.waiting else now
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
        )

    def close(self) -> None:
        """Leave no descriptor behind."""
        if self._host is None:
            wal.release(self._settings.database)

    def preview(self) -> tuple[PersistResult, list[tuple[str, plan.Change]]]:
        """Return what a sync would report and the changes it would make; make none. Blocks."""
        attempt, loaded = _Attempt(Tally(), time.perf_counter()), self._load()
        error: Error | None = loaded.error
        changes: list[tuple[str, plan.Change]] = []
        if loaded.desired is not None:
            try:
                changes = self._differences(loaded.desired.values, attempt.tally)
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
        # A `-wal` that the last sync left is our own.
        is_ours = self._owes_checkpoint and database_stamp(path) == self._database_stamp
        grace = 0.0 if is_ours else self._settings.wal_grace
        opened = self._host.open if self._host else open_database
        try:
            async with opened(path, tally, grace) as database:
                await run_steps(self._steps(values, tally, delta), database, get_on)
        except EventLoopError:
            raise  # the host's loop is closed, which ends the bridge
        except Exception as exc:  # noqa: BLE001 - see `Unforeseen`
            return self._unforeseen.of_database(exc)
        refused = {key for _, key in tally.failed}
        keys = random.sample(list(values), min(SPOT_CHECKED, len(values)))
        self._sample = {key: values[key] for key in keys if key not in refused}
        self._database_stamp = database_stamp(path)
        return None

    def _steps(self, values: Values, tally: Tally, delta: Values | None = None) -> Steps:
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
            pages=pages,
        )

    def _differences(self, values: Values, tally: Tally) -> list[tuple[str, plan.Change]]:
        with open_to_read(self._settings.database, self._settings.wal_grace) as (connection, _):
            return preview_steps(self._steps(values, tally), connection)

    async def _sample_differs(self) -> bool:
        if self._host is None:
            return bool(self._differences(self._sample, Tally()))
        async with self._host.open(self._settings.database, Tally()) as lent:
            preview = Preview(lent)
            await run_steps(self._steps(self._sample, Tally()), preview)
            return lent.connection is not lent.last or bool(preview.changes)

    async def _was_overwritten(self) -> bool:
        """Whether somebody has replaced the content of the database.

        A file that was moved into place has another inode; one that was copied over has not, so a
        few keys are looked up. Only where the files changed, as they do with every packet.
        """
        stamp = database_stamp(self._settings.database)
        if stamp == self._database_stamp or not self._sample:
            return False
        try:
            differs = await self._sample_differs()
        except DatabaseBusy:
            return False  # the next sweep asks again
        except Exception:  # noqa: BLE001 - a full sync says what it is
            return True
        if not differs:
            self._database_stamp = stamp
        return differs

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
