"""One look: read the snapshot, compare, apply, and say what came of it.

All of it happens in the worker's thread, the database's part in an event loop of its own there.
The host's loop is never held up, and nothing that it does, stalling or cancelling, reaches into
a transaction.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from mbcap_watch import plan, store
from mbcap_watch.errors import (
    DatabaseBusy,
    DatabaseError,
    DatabaseFailed,
    SnapshotError,
    SnapshotMalformed,
)
from mbcap_watch.ledger import Ledger
from mbcap_watch.limits import require_descriptors, require_thread
from mbcap_watch.report import describe
from mbcap_watch.result import PersistResult, Reason, Timings
from mbcap_watch.snapshot import SNAPSHOT_NAME, parse, read_file

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from mbcap_watch.settings import Settings
    from mbcap_watch.worker import Worker

T = TypeVar("T")

# An event loop opens three, a database with its WAL three more.
_DESCRIPTORS: Final = 6


class Fingerprint(NamedTuple):
    """Tells one state of the files from another.

    Attributes:
        snapshot: a digest of the snapshot's bytes, or what kept them from being read.
        database: which file is at the database's path (device and inode); None if there is none.
            A backup that was moved into place wants the snapshot anew.

    """

    snapshot: bytes
    database: tuple[int, int] | None


class Reading(NamedTuple):
    """The snapshot file at one moment.

    Attributes:
        fingerprint: of the files at that moment.
        targets: what it wants written; None if it is no usable snapshot, or the known one.
        written_at: `writtenAt` as in the file.
        error: why there are no targets.
        changed_at: when the file was put in place, in seconds since the epoch.

    """

    fingerprint: Fingerprint
    targets: plan.Targets | None = None
    written_at: str | None = None
    error: SnapshotError | None = None
    changed_at: float | None = None


class Looker:
    """Looks at one snapshot for one database, and remembers what it has seen of the files.

    Attributes:
        error: what stood in the way of the last look; None if nothing did.
        snapshot_changed: whether the last look found another snapshot than the one before.
        timings: of the last look that reached the database; None if it did not.

    """

    def __init__(self, settings: Settings, worker: Worker) -> None:
        self._settings = settings
        self._worker = worker
        self._seen: Fingerprint | None = None
        self._busy: _Attempt | None = None
        self.error: SnapshotError | DatabaseError | None = None
        self.snapshot_changed = False
        self.timings: Timings | None = None

    async def look(self, reason: Reason) -> PersistResult:
        """Look once, and say what came of it.

        After `busy`, the next look goes on where this one stopped, and its result counts the work
        of both.
        """
        result = await self._look(reason, None)
        assert result is not None
        return result

    async def look_if_changed(self, reason: Reason) -> PersistResult | None:
        """Look once; return None if the files are those that were seen before."""
        return await self._look(reason, self._seen)

    async def persist(self) -> tuple[PersistResult, None]:
        """Look once, for `persist_once`."""
        return await self.look("once"), None

    async def _look(self, reason: Reason, known: Fingerprint | None) -> PersistResult | None:
        attempt = self._busy or _Attempt(
            Ledger(on_progress=self._worker.note_progress), time.perf_counter()
        )
        try:
            reading, error = await self._worker.call(
                _read_and_apply, self._settings, known, attempt.ledger
            )
        except asyncio.CancelledError:
            attempt.ledger.stop()
            raise
        before, now = self._seen, reading.fingerprint
        self.snapshot_changed = before is None or before.snapshot != now.snapshot
        self.timings = None
        if now == known:
            return None
        if reading.targets is not None and error is None:
            self.timings = self._timings(reading, attempt.ledger)
        self._seen, self.error = now, error
        self._busy = attempt if isinstance(error, DatabaseBusy) else None
        seconds = time.perf_counter() - attempt.started
        return describe(reason, reading.targets, reading.written_at, attempt.ledger, error, seconds)

    def _timings(self, reading: Reading, ledger: Ledger) -> Timings:
        lag = None
        if self.snapshot_changed and reading.changed_at is not None and ledger.changed.total():
            lag = time.time() - reading.changed_at
        return Timings(
            lag=lag if lag is None or lag >= 0 else None,  # the server's clock may be ahead
            waits=tuple(ledger.waits),
            holds=tuple(ledger.holds),
        )

    async def preview(self) -> tuple[PersistResult, list[tuple[str, plan.Change]]]:
        """Return what a look would report and the changes it would make, and make none."""
        started = time.perf_counter()
        ledger = Ledger()
        reading, error, changes = await self._worker.call(_read_and_preview, self._settings, ledger)
        seconds = time.perf_counter() - started
        result = describe("once", reading.targets, reading.written_at, ledger, error, seconds)
        return result, changes


class _Attempt(NamedTuple):
    """The applying of a snapshot that took, or takes, more than one look."""

    ledger: Ledger
    started: float


# ------------------------------------------------------------------------------ in the thread


def read(settings: Settings, known: Fingerprint | None = None) -> Reading:
    """Read the snapshot and see what it wants. Blocks.

    Args:
        settings: which files, and how large the snapshot may be.
        known: if the files still have this fingerprint, the snapshot is not parsed.

    """
    path = settings.snapshot_dir / SNAPSHOT_NAME
    database = _identity(settings.database)
    try:
        data, changed_at = read_file(path, settings.max_bytes)
    except SnapshotError as exc:
        state = f"{type(exc).__name__}: {exc}".encode(errors="replace")
        return Reading(Fingerprint(state, database), error=exc)
    fingerprint = Fingerprint(hashlib.blake2b(data, digest_size=16).digest(), database)
    if fingerprint == known:
        return Reading(fingerprint)
    try:
        snapshot = parse(data, source=str(path))
    except SnapshotMalformed as exc:
        return Reading(fingerprint, error=exc)
    del data
    return Reading(
        fingerprint, plan.targets(snapshot.entries), snapshot.written_at, changed_at=changed_at
    )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None  # applying tells why
    return status.st_dev, status.st_ino


def _read_and_apply(
    settings: Settings, known: Fingerprint | None, ledger: Ledger
) -> tuple[Reading, SnapshotError | DatabaseError | None]:
    reading = read(settings, known)
    if reading.targets is None or ledger.stopped:
        return reading, reading.error
    _, error = _in_own_loop(
        settings.database,
        lambda values: store.apply(
            settings.database,
            values,
            ledger,
            batch_rows=settings.batch_rows,
            downgrade=settings.downgrade,
        ),
        reading.targets.values,
    )
    return reading, error


def _read_and_preview(
    settings: Settings, ledger: Ledger
) -> tuple[Reading, SnapshotError | DatabaseError | None, list[tuple[str, plan.Change]]]:
    reading = read(settings)
    if reading.targets is None:
        return reading, reading.error, []
    changes, error = _in_own_loop(
        settings.database,
        lambda values: store.preview(
            settings.database, values, ledger, downgrade=settings.downgrade
        ),
        reading.targets.values,
    )
    ledger.changed.update(table for table, _ in changes or [])
    return reading, error, changes or []


def _in_own_loop(
    database: Path,
    work: Callable[[dict[str, plan.Value]], Coroutine[Any, Any, T]],
    values: dict[str, plan.Value],
) -> tuple[T | None, DatabaseError | None]:
    """Run the database's part; whatever the machine is short of is a failure like others."""
    try:
        require_descriptors(_DESCRIPTORS)
        require_thread()
        return asyncio.run(work(values)), None
    except DatabaseError as exc:
        error = exc
    except (OSError, MemoryError) as exc:
        error = DatabaseFailed(database, f"cannot be opened now: {exc}")
    # Kept until the next look: it may not keep the frames, and with them the whole snapshot.
    error.__cause__ = error.__context__ = None
    return None, error.with_traceback(None)
