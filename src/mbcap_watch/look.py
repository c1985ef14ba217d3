"""One look: read the snapshot, compare, apply, and say what came of it.

All of it happens in the worker's thread, the database's part in an event loop of its own there.
The host's loop is never held up, and nothing that it does, stalling or cancelling, reaches into
a transaction.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import random
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, TypeVar

from mbcap_watch import plan, store
from mbcap_watch.errors import (
    DatabaseBusy,
    DatabaseError,
    DatabaseFailed,
    SnapshotError,
    SnapshotUnreadable,
)
from mbcap_watch.ledger import Ledger
from mbcap_watch.limits import require_descriptors
from mbcap_watch.reading import Fingerprint, Reading, read
from mbcap_watch.report import describe
from mbcap_watch.result import PersistResult, Reason, Timings
from mbcap_watch.snapshot import SNAPSHOT_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from mbcap_watch.errors import Cause
    from mbcap_watch.settings import Settings
    from mbcap_watch.worker import Worker

logger = logging.getLogger("mbcap_watch")

OnProgress: TypeAlias = "Callable[[int, int], object]"
T = TypeVar("T")

# An event loop opens three, a database with its WAL three more.
_DESCRIPTORS: Final = 6

# What the last snapshot wanted is kept up to this size of its file (17,000 entries, 4 MB), to write
# first what is new in the next one: without, a rename of 2,400 entries takes half as long again to
# be seen.
KEPT_BYTES: Final = 2 << 20

# If more than one entry in so many is new, looking them up first saves nothing.
NEWS_SHARE: Final = 4

# Keys that are looked up where the database's files changed, to see whether it was overwritten by
# a backup in place. A full comparison each time would cost what the resync does.
SPOT_CHECKED: Final = 50


class Looker:
    """Looks at one snapshot for one database, and remembers what it has seen of the files.

    Attributes:
        error: what stood in the way of the last look; None if nothing did.
        snapshot_changed: whether the last look found another snapshot than the one before.
        timings: of the last look that reached the database; None if it did not.
        owes_checkpoint: whether another look must empty the `-wal` that this one filled.

    """

    def __init__(
        self, settings: Settings, worker: Worker, on_progress: OnProgress | None = None
    ) -> None:
        self._settings = settings
        self._worker = worker
        self._on_progress = on_progress
        self._seen: Fingerprint | None = None
        self._busy: _Attempt | None = None
        self._behind = False  # whether there was a new snapshot since the last full comparison
        self._applied: dict[str, plan.Value] | None = None
        self._sample: dict[str, plan.Value] = {}
        self._stamp: tuple[object, ...] = ()
        self.owes_checkpoint = False
        self._logged: set[tuple[object, ...]] = set()
        self.error: SnapshotError | DatabaseError | None = None
        self.snapshot_changed = False
        self.timings: Timings | None = None

    async def look(self, reason: Reason, first: Callable[[], None] | None = None) -> PersistResult:
        """Look once, and say what came of it.

        After `busy`, the next look goes on where this one stopped, and its result counts the work
        of both.

        Args:
            reason: for the look.
            first: what to do in the thread before.

        """
        result = await self._look(reason, first, None)
        assert result is not None
        return result

    async def look_if_changed(
        self, reason: Reason, first: Callable[[], None] | None = None
    ) -> PersistResult | None:
        """Look once; return None if the files are those that were seen before."""
        return await self._look(reason, first, self._seen)

    async def persist(self) -> tuple[PersistResult, None]:
        """Look once, for `persist_once`."""
        return await self.look("once"), None

    async def _look(
        self, reason: Reason, first: Callable[[], None] | None, known: Fingerprint | None
    ) -> PersistResult | None:
        attempt = self._busy or _Attempt(
            Ledger(owes_checkpoint=self.owes_checkpoint), time.perf_counter()
        )
        attempt.ledger.on_progress = partial(self._note_progress, attempt.ledger)
        try:
            reading, error = await self._worker.call(
                self._read_and_apply, first, known, attempt.ledger, spot_check=reason == "sweep"
            )
        except asyncio.CancelledError:
            attempt.ledger.stop()
            raise
        except BlockingIOError as exc:
            reading, error = self._not_read(exc)
        before, now = self._seen, reading.fingerprint
        self.snapshot_changed = before is None or before.snapshot != now.snapshot
        self.timings = None
        if now == known and reading.targets is None:
            return None
        self.owes_checkpoint = attempt.ledger.owes_checkpoint
        self._behind |= self.snapshot_changed
        if reading.targets is not None and error is None:
            self.timings = self._timings(reading, attempt.ledger)
            self._behind = False
            values = reading.targets.values
            self._applied = values if reading.size <= KEPT_BYTES else None
        self._seen, self.error = now, error
        self._busy = attempt if isinstance(error, DatabaseBusy) else None
        seconds = time.perf_counter() - attempt.started
        result = describe(
            reason, reading.targets, reading.written_at, attempt.ledger, error, seconds
        )
        if result.outcome == "no_snapshot" and now.database is None:
            # A wrong path of the database moves the directory of the snapshot along.
            return dataclasses.replace(result, cause="no_database")
        return result

    def _timings(self, reading: Reading, ledger: Ledger) -> Timings:
        lag = None
        committed, changed = ledger.committed_at, ledger.changed.total()
        if self._behind and reading.changed_at and committed and changed:
            lag = committed - reading.changed_at
        return Timings(
            lag=lag if lag is None or lag >= 0 else None,  # the server's clock may be ahead
            waits=tuple(ledger.waits),
            holds=tuple(ledger.holds),
        )

    async def preview(self) -> tuple[PersistResult, list[tuple[str, plan.Change]]]:
        """Return what a look would report and the changes it would make, and make none."""
        started = time.perf_counter()
        ledger = Ledger()
        try:
            reading, error, changes = await self._worker.call(self._read_and_preview, ledger)
        except BlockingIOError as exc:
            (reading, error), changes = self._not_read(exc), []
        seconds = time.perf_counter() - started
        result = describe("once", reading.targets, reading.written_at, ledger, error, seconds)
        return result, changes

    def _not_read(self, exc: BlockingIOError) -> tuple[Reading, DatabaseFailed]:
        """Return what a look comes to for which there is no thread."""
        error = DatabaseFailed(self._settings.database, f"not looked at: {exc.strerror}", "limit")
        return Reading(Fingerprint(0, None)), error

    # In the thread from here on.

    def _note_progress(self, ledger: Ledger) -> None:
        self._worker.note_progress()
        if self._on_progress is not None:
            self._on_progress(min(ledger.matched.total(), ledger.wanted), ledger.wanted)

    def _read_and_apply(
        self,
        first: Callable[[], None] | None,
        known: Fingerprint | None,
        ledger: Ledger,
        *,
        spot_check: bool,
    ) -> tuple[Reading, SnapshotError | DatabaseError | None]:
        reading = self._read(known, first)
        if spot_check and reading.fingerprint == known and self._was_overwritten():
            reading = self._read(None, None)
        if reading.targets is None or ledger.stopped:
            return reading, reading.error
        settings, values = self._settings, reading.targets.values
        ledger.wanted = len(values)
        news = None
        if self._applied is not None:
            news = plan.news(self._applied, values)
            if len(news) * NEWS_SHARE > len(values):
                news = None
        _, error = self._in_loop(
            lambda: store.apply(
                settings.database,
                values,
                ledger,
                news=news,
                batch_rows=settings.batch_rows,
                downgrade=settings.downgrade,
                grace=self._grace(),
            )
        )
        if error is None:
            refused = {key for _, key in ledger.failed}
            keys = random.sample(list(values), min(SPOT_CHECKED, len(values)))
            self._sample = {key: values[key] for key in keys if key not in refused}
            self._stamp = _stamp(settings.database)
        return reading, error

    def _grace(self) -> float:
        """Return how long a `-wal` is left alone; what the last look left there, it may take up."""
        ours = self.owes_checkpoint and _stamp(self._settings.database) == self._stamp
        return 0.0 if ours else self._settings.wal_grace

    def _was_overwritten(self) -> bool:
        """Whether the database is not what the last look left, by a few keys chosen at random.

        Its inode tells of a file that was moved into place, but not of one that was copied over
        it. Asked only where the files changed, as they do with every packet.
        """
        settings, stamp = self._settings, _stamp(self._settings.database)
        if stamp == self._stamp or not self._sample:
            return False
        differs, error = self._in_loop(
            lambda: store.differs(
                settings.database,
                self._sample,
                Ledger(),
                downgrade=settings.downgrade,
                grace=settings.wal_grace,
            )
        )
        if isinstance(error, DatabaseBusy):
            return False  # the next sweep asks again
        if error is None and not differs:
            self._stamp = stamp
            return False
        return True

    def _read_and_preview(
        self, ledger: Ledger
    ) -> tuple[Reading, SnapshotError | DatabaseError | None, list[tuple[str, plan.Change]]]:
        settings = self._settings
        reading = self._read()
        if reading.targets is None:
            return reading, reading.error, []
        values = reading.targets.values
        changes, error = self._in_loop(
            lambda: store.preview(
                settings.database,
                values,
                ledger,
                downgrade=settings.downgrade,
                grace=settings.wal_grace,
            )
        )
        ledger.changed.update(table for table, _ in changes or [])
        return reading, error, changes or []

    def _read(
        self, known: Fingerprint | None = None, first: Callable[[], None] | None = None
    ) -> Reading:
        try:
            if first is not None:
                first()
            return read(self._settings, known, self._worker.note_progress)
        except Exception as exc:  # noqa: BLE001 - as in `_in_loop`
            path = self._settings.snapshot_dir / SNAPSHOT_NAME
            error = SnapshotUnreadable(path, f"could not be read: {self._unforeseen(exc)}")
        return Reading(Fingerprint(hash((type(error), str(error))), None), error=error)

    def _in_loop(
        self, work: Callable[[], Coroutine[Any, Any, T]]
    ) -> tuple[T | None, DatabaseError | None]:
        """Run the database's part. Whatever the files or the machine do is a failure like others.

        No error of any type may end the bridge: the next state of the files may be a good one.
        """
        try:
            require_descriptors(_DESCRIPTORS)
            return self._worker.run(work()), None
        except DatabaseError as exc:
            error = exc
        except OSError as exc:
            text = f"cannot be opened now: {exc.strerror or exc}"
            error = DatabaseFailed(self._settings.database, text, "limit")
        except Exception as exc:  # noqa: BLE001 - see above
            text = f"could not be compared or written: {self._unforeseen(exc)}"
            cause: Cause | None = "limit" if isinstance(exc, MemoryError) else None
            error = DatabaseFailed(self._settings.database, text, cause)
        # Kept until the next look: it may not keep the frames, and with them the whole snapshot.
        error.__cause__ = error.__context__ = None
        return None, error.with_traceback(None)

    def _unforeseen(self, error: Exception) -> str:
        """Name an error that nobody foresaw; log where it came from, once for each place."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        identity = (type(error), place.filename, place.lineno)
        if identity not in self._logged:
            self._logged.add(identity)
            logger.error("an unforeseen error; please report it", exc_info=error)
        return f"{type(error).__name__}: {error}".removesuffix(": ")


def _stamp(database: Path) -> tuple[object, ...]:
    """Return what changes whenever somebody writes to the database or its `-wal`."""
    return tuple(_stamp_of(path) for path in (os.fspath(database), f"{database}-wal"))


def _stamp_of(path: str) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class _Attempt(NamedTuple):
    """The applying of a snapshot that took, or takes, more than one look."""

    ledger: Ledger
    started: float
