"""The spot check: a cheap look for rows that differ again from a snapshot that was applied."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final, TypeAlias

from mbcap_watch.bridge.loading import settled
from mbcap_watch.store import plan
from mbcap_watch.store.reconcile import Tally, compare_new

if TYPE_CHECKING:
    from collections.abc import Callable

    from mbcap_watch.bridge.loading import Stamp
    from mbcap_watch.settings import Downgrade
    from mbcap_watch.store.steps import Steps, Table

Values: TypeAlias = dict[str, plan.Value]

# Keys that are looked up. A full comparison each time would cost what the resync does.
KEYS: Final = 50


class SpotCheck:
    """Remembers what a full comparison left, and looks at a little of it.

    Somebody may have replaced the content of the database: a file that was moved into place has
    another inode; one that was copied over has not, so a few keys are looked up. And a node may
    have returned, as a new row. Only where the files changed, as they do with every packet.
    """

    def __init__(self) -> None:
        self._sample: Values = {}
        self._refused: set[str] = set()
        self._largest: dict[Table, int] = {}  # rowids, when the database was last looked at
        self._stamp: tuple[Stamp, Stamp] | None = None  # likewise

    def remember(self, values: Values, tally: Tally, stamp: tuple[Stamp, Stamp] | None) -> None:
        """Note what was compared, and the stamp of the files before that."""
        self._refused = {key for _, key in tally.failed}
        keys = random.sample(list(values), min(KEYS, len(values)))
        self._sample = {key: values[key] for key in keys if key not in self._refused}
        self._stamp, self._largest = stamp, tally.largest

    def is_due(self, stamp: tuple[Stamp, Stamp]) -> bool:
        """Whether there is something to look at, and the files changed since the last time."""
        return stamp != self._stamp and bool(self._sample)

    def steps(
        self,
        compare: Callable[[Values, Tally], Steps],
        tally: Tally,
        applied: Values | None,
        downgrade: Downgrade,
    ) -> Steps:
        """Look up the sample with `compare`, then the rows that are new, if `applied` is known."""
        yield from compare(self._sample, tally)
        if applied is not None:
            yield from compare_new(applied, self._largest, tally, downgrade)

    def finds_any(
        self,
        changes: list[tuple[str, plan.Change]],
        tally: Tally,
        applied: Values | None,
        stamp: tuple[Stamp, Stamp],
    ) -> bool:
        """Whether what the steps found asks for a sync. If not, the next look starts from here."""
        differs = any(change.public_key not in self._refused for _, change in changes)
        if applied is None:  # any new row may be one of the snapshot's
            known = self._largest
            grown = (last > known.get(table, last) for table, last in tally.largest.items())
            differs = differs or any(grown)
        if not differs:
            self._stamp, self._largest = settled(stamp), tally.largest
        return differs
