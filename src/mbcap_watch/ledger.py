"""`Ledger`: what became of the rows while one snapshot was applied."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclasses.dataclass
class Ledger:
    """What happened to the rows while one snapshot was applied, over all attempts.

    Attributes:
        wanted: keys that the snapshot has a value for.
        matched: rows that the snapshot has a value for, by table.
        changed: rows written, by table.
        unmatched: keys in neither table.
        failed: what refused a row, by table and key.
        waits: for the write lock, in seconds, one per transaction.
        holds: of the write lock, in seconds, one per transaction.
        committed_at: when rows were last committed, in seconds since the epoch; None before.
        waiting: what a table that cannot be served yet lacks.
        on_progress: called for every page read and every batch written.
        owes_checkpoint: whether a `-wal` that was empty before a write is not yet so again, because
            somebody read from it meanwhile.
        stopped: whether whoever waits for this has gone; then the rest is left for another look.

    """

    wanted: int = 0
    matched: Counter[str] = dataclasses.field(default_factory=Counter)
    changed: Counter[str] = dataclasses.field(default_factory=Counter)
    unmatched: int = 0
    failed: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    waits: list[float] = dataclasses.field(default_factory=list)
    holds: list[float] = dataclasses.field(default_factory=list)
    committed_at: float | None = None
    waiting: str | None = None
    on_progress: Callable[[], None] = lambda: None
    owes_checkpoint: bool = False
    stopped: bool = False

    def stop(self) -> None:
        """Ask for the work to end at the next batch."""
        self.stopped = True
