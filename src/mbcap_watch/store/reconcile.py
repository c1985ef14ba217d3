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
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mbcap_watch.errors import SchemaMissing
from mbcap_watch.settings import MAX_BATCH_ROWS
from mbcap_watch.store import plan, schema
from mbcap_watch.store.errors import message
from mbcap_watch.store.steps import LOOKUP, SCAN, SIZE, Query, Write

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence
    from pathlib import Path

    from mbcap_watch.settings import Downgrade
    from mbcap_watch.store.schema import Table
    from mbcap_watch.store.steps import Steps

# A row can move or change between reading and writing it. It is compared again, but not for
# ever: a trigger may be what keeps it as it is.
MAX_PASSES: Final = 3

# Evidence per batch. It is a word in practice; 500 rows of 200,000 characters held the lock for
# 0.3 s.
BATCH_CHARACTERS: Final = 256 * 1024

# Waits and holds that are remembered of one snapshot: a million rows take 2,000, but a database may
# be busy for days.
MAX_TIMES: Final = 10_000

# Rows that are looked for one by one when they are refused.
MAX_HALVED: Final = 1_000


def _times() -> deque[float]:
    return deque(maxlen=MAX_TIMES)


class Pages(NamedTuple):
    """How the tables are read.

    Attributes:
        rows: rows per SELECT; bounds the memory.
        keys: keys per SELECT. Bound one by one: json_each() would cut a key short at a NUL.
        rows_per_key: a larger table is not read as a whole. That costs about 0.5 µs a row, looking
            up keys 2.3 µs a key.

    """

    rows: int = 5_000
    keys: int = 900
    rows_per_key: float = 4


PAGES: Final = Pages()


@dataclasses.dataclass
class Tally:
    """What happened to the rows while one snapshot was applied, over all attempts.

    Attributes:
        wanted: keys that the snapshot has a value for.
        matched: rows that the snapshot has a value for, by table.
        changed: rows written, by table.
        revalued: of the rows written, at least so many held another value, and not none; where a
            batch was written in part, it is not known which of its rows were.
        unmatched: keys in neither table.
        failed: what refused a row, by table and key.
        served: the tables that can be served.
        waiting: what a table that cannot be served yet lacks.
        waits: for the write lock, in seconds, one per transaction; the latest `MAX_TIMES`.
        holds: of the write lock, in seconds, likewise.
        committed_at: when rows were last committed, in seconds since the epoch; None before.
        owes_checkpoint: whether a `-wal` that was empty before a write is not yet so again, because
            somebody read from it meanwhile.

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
    owes_checkpoint: bool = False


def reconcile(
    database: Path,
    values: dict[str, plan.Value],
    tally: Tally,
    *,
    delta: dict[str, plan.Value] | None = None,
    batch_rows: int,
    downgrade: Downgrade,
    pages: Pages = PAGES,
) -> Steps:
    """Make the rows what `values` says; count in `tally` what was done.

    Compares first, without the write lock; then writes only the rows that differ, in batches that
    each hold the lock for as long as one statement takes.

    Args:
        database: what an error calls it.
        values: by public key.
        tally: is written.
        delta: those of `values` that are likely to differ. Their rows are written before all the
            others are compared, which they then are as well.
        batch_rows: rows per transaction; `MAX_BATCH_ROWS` at most.
        downgrade: whether a stored value may be lowered.
        pages: how the tables are read.

    Raises:
        SchemaMissing: no table can be served.

    """
    tally.wanted = len(values)
    rules = _Rules(tally, min(batch_rows, MAX_BATCH_ROWS), downgrade, pages)
    served = yield from _served_tables(database, tally)
    if delta:
        yield from _Pass(delta, rules).look_up_in(served)
    for _ in range(MAX_PASSES):
        comparison = _Pass(values, rules)
        yield from comparison.read((yield from _sizes(served)))
        if not comparison.missed:
            return
    comparison = _Pass(values, rules, writes=False)
    yield from comparison.read((yield from _sizes(served)))
    for table, changes in comparison.pending.items():
        why = "an UPDATE leaves it as it is"
        tally.failed.update({(table.name, change.public_key): why for change in changes})


def _served_tables(database: Path, tally: Tally) -> Generator[Query, Any, list[Table]]:
    """Return the tables that can be served. Never cached: tables may come and go."""
    tables, obstacles = schema.served((yield Query(schema.PROBE)))
    tally.served = frozenset(table.name for table in tables)
    tally.waiting = obstacles or None
    if not tables:
        raise SchemaMissing(database, obstacles)
    return tables


def _sizes(tables: Sequence[Table]) -> Generator[Query, Any, dict[Table, float]]:
    """Return the tables that have rows, each with its size.

    The size is the largest rowid, which is found at once; it counts deleted rows, too, but an
    upper bound will do. Of a table without rowids it is not known.
    """
    sizes = ", ".join(
        SIZE.format(table=table.name, row=table.row) if table.has_rowid else "0" for table in tables
    )
    [largest] = yield Query(f"SELECT {sizes}")
    found = zip(tables, largest, strict=True)
    return {t: size if t.has_rowid else math.inf for t, size in found if size is not None}


class _Rules(NamedTuple):
    """What is the same for all passes."""

    tally: Tally
    batch_rows: int
    downgrade: Downgrade
    pages: Pages


class _Pass:
    """One comparison of rows with `values`, which writes those that differ on its way.

    Attributes:
        pending: rows that differ and are not written yet, by table.
        missed: rows that had changed between reading and writing them.

    """

    def __init__(
        self, values: Mapping[str, plan.Value], rules: _Rules, *, writes: bool = True
    ) -> None:
        self._values = values
        self._tally, self._batch_rows, self._downgrade, self._pages = rules
        self._writes = writes
        self._seen: set[str] = set()
        self.pending: dict[Table, list[plan.Change]] = {}
        self.missed = 0
        self._tally.matched.clear()
        self._tally.failed.clear()

    def read(self, sizes: Mapping[Table, float]) -> Steps:
        """Read the tables in the way that is cheaper for their size.

        The whole table where the snapshot covers a good part of it, the snapshot's keys where the
        table is far larger, or has no rowid to read it by.
        """
        for table, size in sizes.items():
            if size <= self._pages.rows_per_key * len(self._values):
                yield from self._scan(table)
            else:
                yield from self._look_up(table)
        yield from self._end()

    def look_up_in(self, tables: Iterable[Table]) -> Steps:
        """Read the rows of the keys, whatever the size of the tables."""
        for table in tables:
            yield from self._look_up(table)
        yield from self._end()

    def _scan(self, table: Table) -> Steps:
        sql = SCAN.format(table=table.name, row=table.row)
        after, full = -math.inf, True  # every integer may be a rowid
        while full:
            page = yield Query(sql, (after, after, self._pages.rows - 1), is_page=True)
            yield from self._compare(table, self._values, page)
            full = len(page.ids) == self._pages.rows
            after = max(page.ids, default=after)

    def _look_up(self, table: Table) -> Steps:
        items = iter(self._values.items())
        # A column that ignores case gives rows of other keys as well, also of another page's.
        while some := dict(itertools.islice(items, self._pages.keys)):
            keys = ", ".join("?" * len(some))
            sql = LOOKUP.format(table=table.name, row=table.row, keys=keys)
            page = yield Query(sql, tuple(some), is_page=True)
            yield from self._compare(table, some, page)

    def _compare(self, table: Table, values: Mapping[str, plan.Value], page: plan.Page) -> Steps:
        matched, changes = plan.compare(values, page, self._downgrade)
        self._tally.matched[table.name] += len(matched)
        self._seen.update(matched)
        pending = self.pending.setdefault(table, [])
        pending += changes
        while self._writes and len(pending) >= self._batch_rows:
            yield from self._write_some(table)

    def _end(self) -> Steps:
        self._tally.unmatched = len(self._values) - len(self._seen)
        for table, changes in self.pending.items():
            while self._writes and changes:
                yield from self._write_some(table)

    def _write_some(self, table: Table) -> Steps:
        pending = self.pending[table]
        batch = pending[: _fitting(pending, self._batch_rows)]
        yield from self._write(table, batch)
        del pending[: len(batch)]

    def _write(self, table: Table, changes: Sequence[plan.Change]) -> Steps:
        """Write a batch; where a row is refused, write the others.

        A row that a trigger or a constraint refuses takes its batch down. Halving finds it in a
        few short transactions. Once very many rows were refused, a batch is given up as a whole:
        then it is the table that refuses.
        """
        tally = self._tally
        written = yield Write(table, changes, self._downgrade)
        tally.changed[table.name] += written.rows
        blank = sum(change.before in ((0, None), (0, "")) for change in changes)
        tally.revalued += max(0, written.rows - blank)
        if written.error is None:
            self.missed += len(changes) - written.rows
            return
        if table not in schema.served((yield Query(schema.PROBE)))[0]:
            raise written.error  # its columns were dropped between reading and writing
        if len(changes) == 1 or len(tally.failed) >= MAX_HALVED:
            why = message(written.error)
            tally.failed.update({(table.name, change.public_key): why for change in changes})
            return
        half = len(changes) // 2
        yield from self._write(table, changes[:half])
        yield from self._write(table, changes[half:])


def _fitting(changes: Sequence[plan.Change], size: int) -> int:
    """Return how many of the changes, at most `size`, make a batch that is written quickly."""
    length = 0
    for count, change in enumerate(changes[:size], 1):
        length += len(change.after[1] or "")
        if length >= BATCH_CHARACTERS:
            return count
    return min(len(changes), size)
