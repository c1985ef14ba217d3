"""What a look led to, as frozen data for hooks, logs and `--json`."""

from __future__ import annotations

import dataclasses
from typing import Literal

import msgspec

Outcome = Literal[
    "applied",
    "unchanged",
    "no_snapshot",
    "malformed",
    "refused",
    "database_missing",
    "schema_missing",
    "busy",
    "failed",
]

Reason = Literal["start", "rename", "poll", "sweep", "resync", "retry", "once"]
"""What made the bridge look.

`start` of the service, a `rename` seen by inotify, a `poll` or a `sweep` that found the file
changed, a periodic `resync` with the database, a `retry` after something failed, or a caller that
asked for it `once`.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PersistResult:
    """What one look led to.

    Attributes:
        outcome: `applied` (rows were written), `unchanged` (nothing differed), or why not.
        reason: what made the bridge look.
        entries: entries in the snapshot.
        skipped_unknown: entries with the status `unknown`, which is never written.
        skipped_unrecognized: entries not written for another reason (no known status, no key).
        unmatched: keys to be written that are in neither table.
        matched_active: rows of `nodes` that the snapshot has a value for.
        matched_inactive: the same of `inactive_nodes`.
        changed_active: rows of `nodes` that were written.
        changed_inactive: the same of `inactive_nodes`.
        failed_rows: rows that could not be written (a trigger or a constraint refused).
        written_at: `writtenAt` as in the file.
        error: what went wrong, for people; None if nothing did.
        seconds: how long all of it took.
        lock_seconds: the longest single hold of the write lock; 0.0 if it was never taken.

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
    written_at: str | None = None
    error: str | None = None
    seconds: float = 0.0
    lock_seconds: float = 0.0

    def to_json(self) -> str:
        """Return one JSON object with exactly these fields, in this order, on one line."""
        return msgspec.json.encode(self).decode()
