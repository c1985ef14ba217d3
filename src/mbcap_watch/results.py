"""What a sync led to, and how the watch is: frozen data for hooks, logs and `--json`."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import msgspec

from mbcap_watch.errors import Cause  # noqa: TC001 - msgspec wants to know it

Outcome = Literal[
    "applied",
    "unchanged",
    "no_snapshot",
    "malformed",
    "refused",
    "database_missing",
    "schema_missing",
    "foreign_wal",
    "busy",
    "failed",
]

Reason = Literal["start", "rename", "poll", "sweep", "resync", "retry", "request", "once"]
"""What made the bridge sync.

`start` of the service, a `rename` seen by inotify, a `poll` or a `sweep` that found the file
changed, a periodic `resync` with the database, a `retry` after something failed, a `request` to the
running bridge, or a caller that asked for it `once`.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PersistResult:
    """What one sync led to.

    Attributes:
        outcome: `applied` (rows were written), `unchanged` (nothing differed), or why not.
        reason: what made the bridge sync.
        entries: entries in the snapshot.
        skipped_unknown: entries with the status `unknown`, which is never written.
        skipped_unrecognized: entries not written for another reason (no known status, no key, a
            key or an evidence that is too long).
        unmatched: keys to be written that are in neither table.
        matched_active: rows of `nodes` that the snapshot has a value for.
        matched_inactive: the same of `inactive_nodes`.
        changed_active: rows of `nodes` that were written.
        changed_inactive: the same of `inactive_nodes`.
        failed_rows: rows that could not be written (a trigger or a constraint refused).
        set_back: rows that were written again although this bridge had applied the same snapshot
            before, and that held another value meanwhile: a trigger or another writer has set
            them back. A row without a value (0 and no evidence) is a node that returned.
        held: keys with a lowering that waits, because of `downgrade = "hold"`.
        written_at: `writtenAt` as in the file.
        error: what went wrong, for people; None if nothing did.
        seconds: how long all of it took.
        lock_seconds: the longest single hold of the write lock; 0.0 if it was never taken.
        cause: what is behind a database that `failed`, for programs that hold the result; None if
            that cannot be told. Not in the JSON, where `error` says it. Of `no_snapshot`: whether
            there is no database either; of `applied` and `unchanged`: whether the table nodes could
            not be served.

    """

    outcome: Outcome
    reason: Reason
    entries: int = 0
    skipped_unknown: int = 0
    skipped_unrecognized: int = 0
    unmatched: int = 0
    matched_active: int = 0
    matched_inactive: int = 0
    changed_active: int = 0
    changed_inactive: int = 0
    failed_rows: int = 0
    set_back: int = 0
    held: int = 0
    written_at: str | None = None
    error: str | None = None
    seconds: float = 0.0
    lock_seconds: float = 0.0
    cause: Cause | None = None

    @property
    def changed(self) -> int:
        """Rows that were written, in both tables."""
        return self.changed_active + self.changed_inactive

    @property
    def compared(self) -> bool:
        """Whether the database was compared with the snapshot as a whole."""
        return self.outcome in ("applied", "unchanged")

    @property
    def matches_nothing(self) -> bool:
        """Whether there are keys to be written, and not one of them is in the database."""
        matched = self.matched_active + self.matched_inactive
        return self.compared and self.unmatched > 0 and not matched

    def to_dict(self) -> dict[str, Any]:
        """Return exactly the fields of the JSON, in the order above."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        del fields["cause"]
        return fields

    def to_json(self) -> str:
        """Return one JSON object with the fields of `to_dict`, on one line."""
        return msgspec.json.encode(self.to_dict()).decode()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """The times of a sync that compared the database, in seconds.

    Attributes:
        lag: from the rename, or from the start of the bridge if that was later, to the last
            committed row. Where the clock of the filesystem is behind that of this machine, it
            counts at most from when the file was last seen to be another one. None if no new
            snapshot was written, or if the clock of the filesystem is ahead.
        waits: for the write lock, one per transaction.
        holds: of the write lock, one per transaction.

    """

    lag: float | None
    waits: tuple[float, ...] = ()
    holds: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WatchState:
    """How the bridge notices changes, and how that goes. Times are seconds since the epoch.

    Attributes:
        mode: `inotify` or `poll`.
        why: the reason for the mode, for people.
        degraded: whether it polls only because inotify cannot be had for now.
        armed_since: when the present inotify watch was armed; None without one.
        rearms: how often a watch had to be armed anew.
        last_problem: what was wrong with the last watch that was lost; None if none was.
        sweep_hits: changes of the file that the watch did not tell of, found by the sweep.
        last_sweep_hit: when the latest of them was found; None if there was none.
        read_errors: syncs to which the operating system refused the file.
        last_sync: when a sync last ended; None before the first.
        last_progress: when a sync that takes more than a few seconds, or a call that was stuck,
            was last seen to get on; None if that was never so.
        stuck_since: since when a call to the filesystem has not come back, as on a mount whose
            server is gone; None if all is well.
        reports_dropped: reports that the host was too slow to take.

    """

    mode: Literal["inotify", "poll"] = "poll"
    why: str = "not started"
    degraded: bool = False
    armed_since: float | None = None
    rearms: int = 0
    last_problem: str | None = None
    sweep_hits: int = 0
    last_sweep_hit: float | None = None
    read_errors: int = 0
    last_sync: float | None = None
    last_progress: float | None = None
    stuck_since: float | None = None
    reports_dropped: int = 0
