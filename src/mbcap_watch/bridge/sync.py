"""One sync: load the snapshot, compare, write what differs, and report what came of it."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from mbcap_watch.bridge.loading import Fingerprint, LoadedSnapshot, load
from mbcap_watch.bridge.report import describe
from mbcap_watch.errors import DatabaseBusy, DatabaseError, DatabaseFailed, SnapshotError
from mbcap_watch.results import PersistResult, Reason, Timings
from mbcap_watch.store import plan
from mbcap_watch.store.connection import open_database, open_plainly
from mbcap_watch.store.errors import as_database_errors
from mbcap_watch.store.reconcile import Tally, reconcile
from mbcap_watch.store.steps import preview_steps, run_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from mbcap_watch.settings import Settings

OnProgress: TypeAlias = "Callable[[int, int], object]"

# The desired state is kept up to this size (4 MB), to write first what is new in the next one:
# without, a rename of 2,400 entries takes half as long again to be seen.
KEPT_ENTRIES: Final = 20_000

# If more than one entry in so many is new, looking them up first saves nothing.
DELTA_SHARE: Final = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What came of a sync.

    Attributes:
        result: for the host; None if the files are those of the sync before, and nothing was done.
        timings: None if the database was not compared.
        is_new: whether the snapshot is another than that of the sync before.
        error: what stands in the way of the files being served; None if nothing does.

    """

    result: PersistResult | None
    timings: Timings | None = None
    is_new: bool = False
    error: SnapshotError | DatabaseError | None = None

    @property
    def compared(self) -> bool:
        """Whether the database was compared as a whole."""
        return self.result is not None and self.result.outcome in ("applied", "unchanged")


class Syncer:
    """Syncs one database with one snapshot, and remembers what it has seen of the files.

    Args:
        settings: which files, and how.
        alive: called whenever a sync gets on.
        on_progress: called as `persist_once` says.

    """

    def __init__(
        self,
        settings: Settings,
        alive: Callable[[], None] = lambda: None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._settings = settings
        self._alive = alive
        self._on_progress = on_progress
        self._seen: Fingerprint | None = None
        self._error: SnapshotError | DatabaseError | None = None
        self._busy: _Attempt | None = None
        self._behind = False  # whether there was a new snapshot since the last full comparison
        self._applied: dict[str, plan.Value] | None = None

    async def sync(self, reason: Reason, *, only_if_changed: bool = False) -> SyncReport:
        """Sync once.

        After `busy`, the next sync goes on where this one stopped, and its result counts the work
        of both.

        Args:
            reason: for the sync.
            only_if_changed: whether to do nothing if the files are those of the sync before.

        """
        attempt = self._busy or _Attempt(Tally(), time.perf_counter())
        self._alive()
        before = self._seen
        loaded = load(self._settings, before if only_if_changed else None, self._alive)
        now = self._seen = loaded.fingerprint
        if only_if_changed and now == before:
            return SyncReport(result=None, error=self._error)
        is_new = before is None or before.snapshot != now.snapshot
        self._behind |= is_new
        error: SnapshotError | DatabaseError | None = loaded.error
        timings = None
        if loaded.desired is not None:
            error = await self._apply(loaded.desired.values, attempt.tally)
            if error is None:
                timings = self._timings(loaded, attempt.tally)
                self._behind = False
        self._error = error
        self._busy = attempt if isinstance(error, DatabaseBusy) else None
        result = _describe(reason, loaded, attempt, error)
        return SyncReport(result=result, timings=timings, is_new=is_new, error=error)

    async def _apply(self, values: dict[str, plan.Value], tally: Tally) -> DatabaseError | None:
        """Make the rows what `values` says; return what went wrong."""
        settings = self._settings

        def get_on() -> None:
            self._alive()
            if self._on_progress is not None:
                self._on_progress(min(tally.matched.total(), tally.wanted), tally.wanted)

        steps = reconcile(
            settings.database,
            values,
            tally,
            delta=self._delta(values),
            batch_rows=settings.batch_rows,
            downgrade=settings.downgrade,
        )
        try:
            async with open_database(settings.database, tally) as database:
                await run_steps(steps, database, get_on)
        except DatabaseError as exc:
            return _kept(exc)
        except MemoryError:
            return _short_of(settings, "out of memory")
        self._applied = values if len(values) <= KEPT_ENTRIES else None
        return None

    def _delta(self, values: dict[str, plan.Value]) -> dict[str, plan.Value] | None:
        if self._applied is None:
            return None
        delta = plan.delta(self._applied, values)
        return delta if len(delta) * DELTA_SHARE <= len(values) else None

    def _timings(self, loaded: LoadedSnapshot, tally: Tally) -> Timings:
        lag = None
        committed, changed = tally.committed_at, tally.changed.total()
        if self._behind and loaded.changed_at and committed and changed:
            lag = committed - loaded.changed_at
        return Timings(
            lag=lag if lag is None or lag >= 0 else None,  # the server's clock may be ahead
            waits=tuple(tally.waits),
            holds=tuple(tally.holds),
        )


def preview(settings: Settings) -> tuple[PersistResult, list[tuple[str, plan.Change]]]:
    """Return what a sync would report and, by table, the changes it would make; make none. Blocks.

    Takes no lock and writes nothing.
    """
    attempt = _Attempt(Tally(), time.perf_counter())
    loaded = load(settings)
    error: SnapshotError | DatabaseError | None = loaded.error
    changes: list[tuple[str, plan.Change]] = []
    if loaded.desired is not None:
        steps = reconcile(
            settings.database,
            loaded.desired.values,
            attempt.tally,
            batch_rows=settings.batch_rows,
            downgrade=settings.downgrade,
        )
        try:
            with as_database_errors(settings.database), open_plainly(settings.database) as database:
                changes = preview_steps(steps, database)
        except DatabaseError as exc:
            error = _kept(exc)
        except (OSError, MemoryError) as exc:
            error = _short_of(settings, getattr(exc, "strerror", None) or "out of memory")
    return _describe("once", loaded, attempt, error), changes


class _Attempt(NamedTuple):
    """The applying of a snapshot that took, or takes, more than one sync."""

    tally: Tally
    started: float


def _describe(
    reason: Reason,
    loaded: LoadedSnapshot,
    attempt: _Attempt,
    error: SnapshotError | DatabaseError | None,
) -> PersistResult:
    seconds = time.perf_counter() - attempt.started
    result = describe(reason, loaded.desired, loaded.written_at, attempt.tally, error, seconds)
    if result.outcome == "no_snapshot" and loaded.fingerprint.database is None:
        # A wrong path of the database moves the directory of the snapshot along.
        return dataclasses.replace(result, cause="no_database")
    return result


def _kept(error: DatabaseError) -> DatabaseError:
    """Return the error without its frames, which would keep the whole snapshot alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _short_of(settings: Settings, what: str) -> DatabaseFailed:
    return DatabaseFailed(settings.database, f"cannot be opened now: {what}", "limit")
