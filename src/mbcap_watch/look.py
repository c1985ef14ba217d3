"""One look: read the snapshot, compare, apply, and say what came of it."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from mbcap_watch import plan, store
from mbcap_watch.errors import (
    DatabaseBusy,
    DatabaseError,
    DatabaseMissing,
    SchemaMissing,
    SnapshotError,
    SnapshotMalformed,
    SnapshotNotFound,
    SnapshotRefused,
)
from mbcap_watch.ledger import Ledger
from mbcap_watch.result import Outcome, PersistResult, Reason
from mbcap_watch.snapshot import SNAPSHOT_NAME, parse, read_bytes
from mbcap_watch.tasks import uncancelled

if TYPE_CHECKING:
    from pathlib import Path

    from mbcap_watch.settings import Settings
    from mbcap_watch.worker import Worker


class Reading(NamedTuple):
    """The snapshot file at one moment.

    Attributes:
        fingerprint: tells this state of the file from another: a digest of its bytes, or what
            kept them from being read.
        targets: what it wants written; None if it is no usable snapshot, or the known one.
        written_at: `writtenAt` as in the file.
        error: why there are no targets.

    """

    fingerprint: bytes
    targets: plan.Targets | None = None
    written_at: str | None = None
    error: SnapshotError | None = None


def read(path: Path, max_bytes: int, known: bytes | None) -> Reading:
    """Read the file and see what it wants. Blocks; belongs off the event loop.

    Args:
        path: of the snapshot.
        max_bytes: a larger file is refused.
        known: a fingerprint; a file that still has it is not parsed.

    """
    try:
        data = read_bytes(path, max_bytes)
    except SnapshotError as exc:
        return Reading(f"{type(exc).__name__}: {exc}".encode(errors="replace"), error=exc)
    fingerprint = hashlib.blake2b(data, digest_size=16).digest()
    if fingerprint == known:
        return Reading(fingerprint)
    try:
        snapshot = parse(data, source=str(path))
    except SnapshotMalformed as exc:
        return Reading(fingerprint, error=exc)
    del data
    return Reading(fingerprint, plan.targets(snapshot.entries), snapshot.written_at)


class _Attempt(NamedTuple):
    """The applying of a snapshot that took, or takes, more than one look."""

    ledger: Ledger
    started: float


class Looker:
    """Looks at one snapshot for one database, and remembers what it has seen of the file."""

    def __init__(self, settings: Settings, worker: Worker) -> None:
        self._settings = settings
        self._worker = worker
        self._seen: bytes | None = None
        self._path = settings.snapshot_dir / SNAPSHOT_NAME
        self._attempt: _Attempt | None = None
        self.error: SnapshotError | DatabaseError | None = None

    async def look(self, reason: Reason, *, only_if_changed: bool = False) -> PersistResult | None:
        """Look once; `error` then tells what stood in the way.

        Args:
            reason: goes into the result.
            only_if_changed: do nothing more if the file is the one seen before.

        Returns:
            What came of it; None if there was nothing to do. After `busy`, the next look goes on
            where this one stopped, and its result counts the work of both.

        """
        attempt = self._attempt or _Attempt(Ledger(), time.perf_counter())
        known = self._seen if only_if_changed else None
        reading = await self._worker.call(read, self._path, self._settings.max_bytes, known)
        if reading.fingerprint == known:
            return None
        self._seen = reading.fingerprint
        self.error = reading.error
        if reading.targets is not None:
            self.error = await self._apply(reading.targets, attempt.ledger)
        self._attempt = attempt if isinstance(self.error, DatabaseBusy) else None
        seconds = time.perf_counter() - attempt.started
        return describe(reason, reading, attempt.ledger, self.error, seconds)

    async def preview(self) -> tuple[PersistResult, list[tuple[str, plan.Change]]]:
        """Return what a look would report and the changes it would make, and make none."""
        started = time.perf_counter()
        ledger = Ledger()
        changes: list[tuple[str, plan.Change]] = []
        reading = await self._worker.call(read, self._path, self._settings.max_bytes, None)
        self.error = reading.error
        if reading.targets is not None:
            settings = self._settings
            work = store.preview(
                settings.database, reading.targets.values, ledger, downgrade=settings.downgrade
            )
            try:
                changes = await uncancelled(work, on_cancel=ledger.stop)
            except DatabaseError as exc:
                self.error = exc
        ledger.changed.update(table for table, _ in changes)
        seconds = time.perf_counter() - started
        return describe("once", reading, ledger, self.error, seconds), changes

    async def _apply(self, targets: plan.Targets, ledger: Ledger) -> DatabaseError | None:
        settings = self._settings
        work = store.apply(
            settings.database,
            targets.values,
            ledger,
            batch_rows=settings.batch_rows,
            downgrade=settings.downgrade,
        )
        try:
            await uncancelled(work, on_cancel=ledger.stop)
        except DatabaseError as exc:
            return exc
        return None


def describe(
    reason: Reason,
    reading: Reading,
    ledger: Ledger,
    error: SnapshotError | DatabaseError | None,
    seconds: float,
) -> PersistResult:
    """Return the result of a look. Pure."""
    targets = reading.targets or plan.Targets({}, 0, 0, 0)
    text = _error_text(ledger, error)
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
        written_at=reading.written_at,
        error=text,
        seconds=seconds,
        lock_seconds=ledger.lock_seconds,
    )


_OUTCOMES: Final[tuple[tuple[type[Exception], Outcome], ...]] = (
    (SnapshotNotFound, "no_snapshot"),
    (SnapshotMalformed, "malformed"),
    (SnapshotRefused, "refused"),
    (DatabaseMissing, "database_missing"),
    (SchemaMissing, "schema_missing"),
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
        return f"{table}: the row {key!r}{others} could not be written: {why}"
    return ledger.waiting
