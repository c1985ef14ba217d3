"""What came of a look, put together for people and programs. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mbcap_watch import plan
from mbcap_watch.errors import (
    QUOTED,
    DatabaseBusy,
    DatabaseError,
    DatabaseMissing,
    ForeignWal,
    SchemaMissing,
    SnapshotError,
    SnapshotMalformed,
    SnapshotNotFound,
    SnapshotRefused,
    printable,
    quoted,
)
from mbcap_watch.result import Outcome, PersistResult, Reason

if TYPE_CHECKING:
    from mbcap_watch.ledger import Ledger


def describe(
    reason: Reason,
    targets: plan.Targets | None,
    written_at: str | None,
    ledger: Ledger,
    error: SnapshotError | DatabaseError | None,
    seconds: float,
) -> PersistResult:
    """Return the result of a look. Pure."""
    targets = targets or plan.Targets({}, 0, 0, 0)
    return PersistResult(
        outcome=_outcome(ledger, error),
        reason=reason,
        entries=targets.entries,
        skipped_unknown=targets.skipped_unknown,
        skipped_unrecognized=targets.skipped_unrecognized,
        unmatched=ledger.unmatched,
        matched_active=ledger.matched["nodes"],
        matched_inactive=ledger.matched["inactive_nodes"],
        changed_active=ledger.changed["nodes"],
        changed_inactive=ledger.changed["inactive_nodes"],
        failed_rows=len(ledger.failed),
        written_at=written_at and printable(written_at, QUOTED),
        error=_error_text(ledger, error),
        cause=getattr(error, "cause", None),
        seconds=seconds,
        lock_seconds=max(ledger.holds, default=0.0),
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


def _outcome(ledger: Ledger, error: SnapshotError | DatabaseError | None) -> Outcome:
    if error is not None:
        return next((name for kind, name in _OUTCOMES if isinstance(error, kind)), "failed")
    if ledger.changed.total():
        return "applied"
    return "failed" if ledger.failed else "unchanged"


def _error_text(ledger: Ledger, error: SnapshotError | DatabaseError | None) -> str | None:
    if isinstance(error, SnapshotNotFound) and not error.unusual:
        return None  # a state to wait in, not an error
    if error is not None:
        return str(error)
    if ledger.failed:
        (table, key), why = next(iter(ledger.failed.items()))
        others = f" and {len(ledger.failed) - 1} more" if len(ledger.failed) > 1 else ""
        what = f"{table}: the row {quoted(key)}{others} could not be written"
        return f"{what}: {printable(why, QUOTED)}"
    return ledger.waiting
