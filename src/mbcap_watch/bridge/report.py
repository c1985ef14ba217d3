"""What came of a sync, put together for people and programs, and errors that nobody foresaw."""

from __future__ import annotations

import dataclasses
import logging
import traceback
from typing import TYPE_CHECKING, Final, TypeAlias

from mbcap_watch.errors import (
    QUOTED,
    DatabaseBusy,
    DatabaseError,
    DatabaseFailed,
    DatabaseMissing,
    ForeignWal,
    SchemaMissing,
    SnapshotError,
    SnapshotMalformed,
    SnapshotNotFound,
    SnapshotRefused,
    SnapshotUnreadable,
    printable,
    quoted,
    without_frames,
)
from mbcap_watch.results import Outcome, PersistResult, Reason, Timings
from mbcap_watch.snapshot.codec import SNAPSHOT_NAME
from mbcap_watch.store.plan import DesiredState
from mbcap_watch.store.reconcile import Tally

if TYPE_CHECKING:
    from mbcap_watch.errors import Cause
    from mbcap_watch.settings import Settings

logger = logging.getLogger("mbcap_watch")

_OUTCOMES: Final[tuple[tuple[type[Exception], Outcome], ...]] = (
    (SnapshotNotFound, "no_snapshot"),
    (SnapshotMalformed, "malformed"),
    (SnapshotRefused, "refused"),
    (DatabaseMissing, "database_missing"),
    (SchemaMissing, "schema_missing"),
    (ForeignWal, "foreign_wal"),
    (DatabaseBusy, "busy"),
)

Error: TypeAlias = SnapshotError | DatabaseError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What came of a sync.

    Attributes:
        result: for the host; None if the files are those of the sync before, and nothing was done.
        timings: None if the database was not compared.
        is_new: whether the snapshot differs from that of the sync before.
        error: why the snapshot or the database could not be used; None if both could.
        owes_checkpoint: whether another sync must empty the `-wal` that this one filled.
        due: when the first lowering that waits may be written, by time.monotonic(); None without.

    """

    result: PersistResult | None
    timings: Timings | None = None
    is_new: bool = False
    error: Error | None = None
    owes_checkpoint: bool = False
    due: float | None = None


def describe(
    reason: Reason,
    tally: Tally,
    error: Error | None,
    seconds: float,
    desired: DesiredState | None = None,
    written_at: str | None = None,
    set_back: int = 0,
) -> PersistResult:
    """Return the result of a sync. Pure."""
    desired = desired or DesiredState({}, 0, 0, 0)
    return PersistResult(
        outcome=_outcome(tally, error),
        reason=reason,
        entries=desired.entries,
        skipped_unknown=desired.skipped_unknown,
        skipped_unrecognized=desired.skipped_unrecognized,
        unmatched=tally.unmatched,
        matched_active=tally.matched["nodes"],
        matched_inactive=tally.matched["inactive_nodes"],
        changed_active=tally.changed["nodes"],
        changed_inactive=tally.changed["inactive_nodes"],
        failed_rows=len(tally.failed),
        set_back=set_back,
        held=tally.held,
        written_at=written_at and printable(written_at, QUOTED),
        error=_error_text(tally, error),
        cause=_cause(tally, error),
        seconds=seconds,
        lock_seconds=max(tally.holds, default=0.0),
    )


def _outcome(tally: Tally, error: Error | None) -> Outcome:
    if error is not None:
        return next((name for kind, name in _OUTCOMES if isinstance(error, kind)), "failed")
    if tally.changed.total():
        return "applied"
    return "failed" if tally.failed else "unchanged"


def _error_text(tally: Tally, error: Error | None) -> str | None:
    if isinstance(error, SnapshotNotFound) and not error.unusual:
        return None  # a state to wait in, not an error
    if error is not None:
        return str(error)
    if tally.failed:
        (table, key), why = next(iter(tally.failed.items()))
        others = f" and {len(tally.failed) - 1} more" if len(tally.failed) > 1 else ""
        what = f"{table}: the row {quoted(key)}{others} could not be written"
        return f"{what}: {printable(why, QUOTED)}"
    return tally.waiting


def _cause(tally: Tally, error: Error | None) -> Cause | None:
    if error is None and tally.served and "nodes" not in tally.served:
        return "nodes_not_served"
    return getattr(error, "cause", None)


def out_of_resources(settings: Settings, reason: Reason, error: OSError) -> PersistResult:
    """Return the result of a sync for which there was no thread or no descriptor."""
    problem = f"cannot be served now: {error.strerror}"
    return describe(reason, Tally(), DatabaseFailed(settings.database, problem, "limit"), 0.0)


class Unforeseen:
    """Turns any error into one of ours: none may end the bridge. Logs the unforeseen ones."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._logged: set[tuple[object, ...]] = set()

    def of_database(self, error: Exception) -> DatabaseError:
        """Return the error as one of the database."""
        database = self._settings.database
        if isinstance(error, DatabaseError):
            failed = error
        elif isinstance(error, OSError):
            text = f"cannot be opened now: {error.strerror or error}"
            failed = DatabaseFailed(database, text, "limit")
        else:
            text = f"could not be compared or written: {self._name(error)}"
            cause: Cause | None = "limit" if isinstance(error, MemoryError) else None
            failed = DatabaseFailed(database, text, cause)
        return without_frames(failed)

    def of_snapshot(self, error: Exception) -> SnapshotUnreadable:
        """Return the error as one of the snapshot."""
        text = f"could not be read: {self._name(error)}"
        return SnapshotUnreadable(self._settings.snapshot_dir / SNAPSHOT_NAME, text)

    def _name(self, error: Exception) -> str:
        place = traceback.extract_tb(error.__traceback__)[-1]
        identity = (type(error), place.filename, place.lineno)
        if identity not in self._logged:  # once for each place
            self._logged.add(identity)
            logger.error("an unforeseen error; please report it", exc_info=error)
        return f"{type(error).__name__}: {printable(str(error), QUOTED)}".removesuffix(": ")
