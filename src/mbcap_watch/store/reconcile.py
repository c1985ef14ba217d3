"""Compare the rows with the desired state and write those that differ, without any I/O.

`reconcile` is a generator of steps. It yields a `Query` and is sent the rows, or a `Write` and is
sent what became of it. A driver runs the steps: over the bridge's connection, over the host's, or,
for a dry run, over one that answers a `Write` without writing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mbcap_watch.errors import SchemaMissing
from mbcap_watch.settings import MAX_BATCH_ROWS
from mbcap_watch.store import plan
from mbcap_watch.store.errors import message
from mbcap_watch.store.steps import LOOKUP, NEWER, PROBE, SCAN, SIZE, Query, Write, served

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    from mbcap_watch.settings import Downgrade
    from mbcap_watch.store.steps import Steps, Table

# A row can move or change between reading and writing it. It is compared again, but not for
# ever: a trigger may be what keeps it as it is.
MAX_PASSES: Final = 3

# Evidence per batch: a word in practice; 500 rows of 200,000 characters held the lock for 0.3 s.
BATCH_CHARACTERS: Final = 256 * 1024

# Waits and holds that are remembered: a million rows take 2,000; a database may be busy for days.
MAX_TIMES: Final = 10_000

# Rows that are looked for one by one when they are refused.
MAX_HALVED: Final = 1_000


class Pages(NamedTuple):
    """How the tables are read.

    Attributes:
        rows: rowids per SELECT; bounds the memory.
        keys: keys per SELECT. Bound one by one: json_each() would cut a key short at a NUL.
        rows_per_key: a larger table is not read as a whole. That costs about 0.5 µs a row, looking
            up keys 2.3 µs a key.

    """

    rows: int = 5_000
    keys: int = 900
    rows_per_key: float = 4


PAGES: Final = Pages()
_times = partial(deque[float], maxlen=MAX_TIMES)


@dataclasses.dataclass
class Tally:
    """What happened to the rows while one snapshot was applied, over all attempts.

    Attributes:
        wanted: keys that the snapshot has a value for.
        matched: rows that the snapshot has a value for, by table.
        changed: rows written, by table.
        revalued: rows written that held another value before, not none. It is a lower bound: of a
            batch that was written in part, it is not known which rows were.
        unmatched: keys in neither table.
        failed: what refused a row, by table and key.
        served: the tables that can be served.
        waiting: what a table that cannot be served yet lacks.
        waits: for the write lock, in seconds, one per transaction; the latest `MAX_TIMES`.
        holds: of the write lock, in seconds, likewise.
        committed_at: when rows were last committed, in seconds since the epoch; None before.
        held: keys whose lowering waits.
        largest: the largest rowid of each table that has rowids, and none below 0, from before it
            was compared.
        owes_checkpoint: whether a `-wal` that was empty before a write has still to be emptied:
            somebody was reading from it.

    """

    wanted: int = 0
    matched: Counter[str] = dataclasses.field(default_factory=Counter)
    changed: Counter[str] = dataclasses.field(default_factory=Counter)
    revalued: int = 0
    unmatched: int = 0
    failed: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    served: frozenset[str] = frozenset()
    waiting: str | None = None
    waits: deque[float] = dataclasses.field(default_factory=_times)
    holds: deque[float] = dataclasses.field(default_factory=_times)
    committed_at: float | None = None
    held: int = 0
    largest: dict[Table, int] = dataclasses.field(default_factory=dict)
    owes_checkpoint: bool = False

    def refuse(self, table: Table, changes: Sequence[plan.Change], why: str) -> None:
        """Note rows that could not be written."""
        self.failed.update({(table.name, change.public_key): why for change in changes})


def reconcile(
    database: Path,
    values: dict[str, plan.Value],
    tally: Tally,
    *,
    delta: dict[str, plan.Value] | None = None,
    batch_rows: int,
    downgrade: Downgrade,
    holds: plan.Holds | None = None,
    pages: Pages = PAGES,
) -> Steps:
    """Make the rows what `values` says, by public key; count in `tally` what was done.

    Compares first, without the write lock; then writes only the rows that differ, in batches that
    each hold the lock for as long as one statement takes. The rows of `delta`, those of `values`
    that are likely to differ, are written before all the others are compared. Without `holds`, a
    `hold` lowers nothing.

    Raises:
        SchemaMissing: no table can be served.

    """
    tally.wanted = len(values)
    tables, obstacles = served((yield Query(PROBE)))  # never cached: tables may come and go
    tally.served = frozenset(table.name for table in tables)
    tally.waiting = obstacles or None
    if not tables:
        raise SchemaMissing(database, obstacles)
    holds = holds or plan.Holds()
    work = _Work(tally, min(batch_rows, MAX_BATCH_ROWS), downgrade, holds, pages)
    if delta:
        yield from work.compare(delta, dict.fromkeys(tables, math.inf))
    for _ in range(MAX_PASSES):
        sizes = yield from _sizes(tables)
        bounds = {table: sizes.get(table, 0) for table in tables if table.has_rowid}
        tally.largest = {table: int(most) for table, most in bounds.items() if most < math.inf}
        holds.begin()
        yield from work.compare(values, sizes)
        if not work.missed:
            break
    else:
        work.writes = False
        yield from work.compare(values, (yield from _sizes(tables)))
        for table, changes in work.pending.items():
            tally.refuse(table, changes, "an UPDATE leaves it as it is")
    holds.end({key for _, key in tally.failed})
    tally.held = len(holds.waiting)


def compare_new(
    values: Mapping[str, plan.Value],
    known: Mapping[Table, int],
    tally: Tally,
    downgrade: Downgrade,
    pages: Pages = PAGES,
) -> Steps:
    """Compare only the rows that are new since the largest rowids were those of `known`.

    The largest ones of now are those of `tally`. The last row counts as new: its rowid may have
    been that of a row that was deleted.
    """
    for table in known.keys() & tally.largest.keys():
        last = tally.largest[table]
        first = min(known[table], last)
        while first <= last:
            sql = NEWER.format(table=table.name, row=table.row)
            page = yield Query(sql, (first, pages.rows), is_page=True)
            first = max(page.ids, default=last) + 1
            if changes := plan.compare(values, page, downgrade).changes:
                yield Write(table, changes, downgrade)


def _sizes(tables: Sequence[Table]) -> Generator[Query, Any, dict[Table, float]]:
    """Return the tables that have rows, each with its size.

    The size is the largest rowid, which is found at once; it counts deleted rows, too, but an
    upper bound will do. Without rowids, or with some below 0, it is not known.
    """
    sizes = ", ".join(
        SIZE.format(table=table.name, row=table.row) if table.has_rowid else "0" for table in tables
    )
    [largest] = yield Query(f"SELECT {sizes}")
    found = zip(tables, largest, strict=True)
    return {t: size if t.has_rowid else math.inf for t, size in found if size is not None}


class _Work:
    """Compares rows with their values, and writes those that differ on its way.

    `pending` are the rows that differ and are not written yet; `missed` counts those that had
    changed between reading and writing them.
    """

    def __init__(
        self, tally: Tally, batch_rows: int, downgrade: Downgrade, holds: plan.Holds, pages: Pages
    ) -> None:
        self._tally = tally
        self._batch_rows = batch_rows
        self._downgrade = downgrade
        self._holds = holds
        self._pages = pages
        self._seen: set[str] = set()
        self.writes = True
        self.pending: dict[Table, list[plan.Change]] = {}
        self.missed = 0

    def compare(self, values: Mapping[str, plan.Value], sizes: Mapping[Table, float]) -> Steps:
        """Compare all rows once; read each table in the way that is cheaper for its size.

        The whole table where the snapshot covers a good part of it, the snapshot's keys where the
        table is far larger, or has no rowid to read it by.
        """
        self._seen.clear()
        self._tally.matched.clear()
        self._tally.failed.clear()
        self.pending, self.missed = {table: [] for table in sizes}, 0
        for table, size in sizes.items():
            if size <= self._pages.rows_per_key * len(values):
                yield from self._scan(table, int(size), values)
            else:
                yield from self._look_up(table, values)
        self._tally.unmatched = len(values) - len(self._seen)
        for table in sizes:
            yield from self._write_pending(table, 1)

    def _scan(self, table: Table, size: int, values: Mapping[str, plan.Value]) -> Steps:
        sql, rows = SCAN.format(table=table.name, row=table.row), self._pages.rows
        bounds = (-math.inf, *range(rows, size, rows), math.inf)  # every integer may be a rowid
        for after, last in itertools.pairwise(bounds):
            page = yield Query(sql, (after, last), is_page=True)
            yield from self._compare(table, values, page)

    def _look_up(self, table: Table, values: Mapping[str, plan.Value]) -> Steps:
        items = iter(values.items())
        # A column that ignores case gives rows of other keys as well, also of another page's.
        while some := dict(itertools.islice(items, self._pages.keys)):
            keys = ", ".join("?" * len(some))
            sql = LOOKUP.format(table=table.name, row=table.row, keys=keys)
            page = yield Query(sql, tuple(some), is_page=True)
            yield from self._compare(table, some, page)

    def _compare(self, table: Table, values: Mapping[str, plan.Value], page: plan.Page) -> Steps:
        matched, changes = plan.compare(values, page, self._downgrade, self._holds)
        self._tally.matched[table.name] += len(matched)
        self._seen.update(matched)
        self.pending[table] += changes
        yield from self._write_pending(table, self._batch_rows)

    def _write_pending(self, table: Table, least: int) -> Steps:
        """Write what is pending, in batches, until less than `least` rows are left."""
        pending = self.pending[table]
        while self.writes and len(pending) >= least:
            batch = pending[: self._batch_rows]
            lengths = itertools.accumulate(len(change.after[1] or "") for change in batch)
            del batch[1 + sum(length < BATCH_CHARACTERS for length in lengths) :]
            for downgrade, changes in self._by_guard(batch):
                yield from self._write(table, changes, downgrade)
            del pending[: len(batch)]

    def _by_guard(self, batch: list[plan.Change]) -> Iterator[tuple[Downgrade, list[plan.Change]]]:
        """Part those rows that may be lowered from those that must not be, raised meanwhile."""
        if self._downgrade != "hold":
            yield self._downgrade, batch
            return
        for is_lower in (False, True):
            some = [c for c in batch if plan.lowers(c.before[0], c.after[0]) is is_lower]
            if some:
                yield "allow" if is_lower else "never", some

    def _write(self, table: Table, changes: Sequence[plan.Change], downgrade: Downgrade) -> Steps:
        """Write a batch; where a row is refused, write the others.

        A row that a trigger or a constraint refuses takes its batch down. Halving finds it in a
        few short transactions. Once very many rows were refused, a batch is given up as a whole:
        then it is the table that refuses.
        """
        tally = self._tally
        written = yield Write(table, changes, downgrade)
        tally.changed[table.name] += written.rows
        blank = sum(change.before in ((0, None), (0, "")) for change in changes)
        tally.revalued += max(0, written.rows - blank)
        if written.error is None:
            self.missed += len(changes) - written.rows
            return
        if table not in served((yield Query(PROBE)))[0]:
            raise written.error  # its columns were dropped between reading and writing
        if len(changes) == 1 or len(tally.failed) >= MAX_HALVED:
            tally.refuse(table, changes, message(written.error))
            return
        half = len(changes) // 2
        yield from self._write(table, changes[:half], downgrade)
        yield from self._write(table, changes[half:], downgrade)
