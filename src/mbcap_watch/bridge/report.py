"""The result of a sync, put together for people and programs, and errors nobody foresaw."""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING, Final

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
)
from mbcap_watch.results import Outcome, PersistResult, Reason
from mbcap_watch.snapshot.codec import SNAPSHOT_NAME
from mbcap_watch.store import plan

if TYPE_CHECKING:
    from pathlib import Path

    from mbcap_watch.errors import Cause
    from mbcap_watch.store.reconcile import Tally

logger = logging.getLogger("mbcap_watch")


def describe(
    reason: Reason,
    desired: plan.DesiredState | None,
    written_at: str | None,
    tally: Tally,
    error: SnapshotError | DatabaseError | None,
    seconds: float,
    set_back: int = 0,
) -> PersistResult:
    """Return the result of a sync. Pure."""
    desired = desired or plan.DesiredState({}, 0, 0, 0)
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
        written_at=written_at and printable(written_at, QUOTED),
        error=_error_text(tally, error),
        cause=_cause(tally, error),
        seconds=seconds,
        lock_seconds=max(tally.holds, default=0.0),
    )


_OUTCOMES: Final[tuple[tuple[type[Exception], Outcome], ...]] = (
    (SnapshotNotFound, "no_snapshot"),
    (SnapshotMalformed, "malformed"),
    (SnapshotRefused, "refused"),
    (DatabaseMissing, "database_missing"),
    (SchemaMissing, "schema_missing"),
    (ForeignWal, "foreign_wal"),
    (DatabaseBusy, "busy"),
)


def _outcome(tally: Tally, error: SnapshotError | DatabaseError | None) -> Outcome:
    if error is not None:
        return next((name for kind, name in _OUTCOMES if isinstance(error, kind)), "failed")
    if tally.changed.total():
        return "applied"
    return "failed" if tally.failed else "unchanged"


def _error_text(tally: Tally, error: SnapshotError | DatabaseError | None) -> str | None:
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


def _cause(tally: Tally, error: SnapshotError | DatabaseError | None) -> Cause | None:
    if error is None and tally.served and "nodes" not in tally.served:
        return "nodes_not_served"
    return getattr(error, "cause", None)


class Unforeseen:
    """Names errors that nobody foresaw; logs where one came from, once for each place."""

    def __init__(self) -> None:
        self._logged: set[tuple[object, ...]] = set()

    def in_database(self, database: Path, error: Exception) -> DatabaseFailed:
        """Return the error as one of the database."""
        text = f"could not be compared or written: {self._name(error)}"
        return DatabaseFailed(database, text, "limit" if isinstance(error, MemoryError) else None)

    def in_snapshot(self, directory: Path, error: Exception) -> SnapshotUnreadable:
        """Return the error as one of the snapshot."""
        text = f"could not be read: {self._name(error)}"
        return SnapshotUnreadable(directory / SNAPSHOT_NAME, text)

    def _name(self, error: Exception) -> str:
        place = traceback.extract_tb(error.__traceback__)[-1]
        identity = (type(error), place.filename, place.lineno)
        if identity not in self._logged:
            self._logged.add(identity)
            logger.error("an unforeseen error; please report it", exc_info=error)
        return f"{type(error).__name__}: {printable(str(error), QUOTED)}".removesuffix(": ")
