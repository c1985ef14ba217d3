"""The SQL for rows: how those of the tables that can be served are, and writing what differs."""

from __future__ import annotations

import contextlib
import itertools
import math
import sqlite3
from typing import TYPE_CHECKING, Any, Final

from mbcap_watch import plan, schema
from mbcap_watch.database import open_database, open_to_read
from mbcap_watch.diagnosis import message, refuses_rows
from mbcap_watch.errors import SchemaMissing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence
    from pathlib import Path

    from mbcap_watch.database import Access
    from mbcap_watch.ledger import Ledger
    from mbcap_watch.schema import Table
    from mbcap_watch.settings import Downgrade

# Rows per SELECT: bounds the memory. Larger pages are not faster (500 to 10,000 rows: 52 to 55 ms
# per 100,000), but a small mesh should need one.
PAGE_ROWS: Final = 5_000

# Keys per SELECT. Bound one by one: json_each() would cut a key short at a NUL. Every SQLite takes
# 999 parameters (https://www.sqlite.org/limits.html).
PAGE_KEYS: Final = 900

# Reading a whole table costs about 0.5 µs a row, looking up keys 2.3 µs a key: below this many
# rows per key the scan is cheaper.
SCAN_ROWS_PER_KEY: Final = 4

# A row can move or change between reading and writing it. It is compared again, but not for
# ever: a trigger may be what keeps it as it is.
MAX_PASSES: Final = 3

# Evidence per batch. It is a word in practice; 500 rows of 200,000 characters held the lock for
# 0.3 s.
BATCH_CHARACTERS: Final = 256 * 1024

# Rows that are looked for one by one when they are refused.
MAX_HALVED: Final = 1_000

_SIZE = "(SELECT max({row}) FROM {table})"
_SCAN = (
    "SELECT {row}, public_key, multibyte_sup, multibyte_evidence FROM {table}"
    " WHERE {row} > ? ORDER BY {row} LIMIT ?"
)
_LOOKUP = (
    "SELECT {row}, public_key, multibyte_sup, multibyte_evidence FROM {table}"
    " WHERE public_key IN ({keys})"
)
# By rowid, because that is fastest under the lock; guarded by the key, because a rowid can be
# given to another node meanwhile; and only if it still differs, byte for byte, whatever collation
# the columns have.
_UPDATE = (
    "UPDATE {table} SET multibyte_sup = ?, multibyte_evidence = ?"
    " WHERE {row} = ? AND public_key COLLATE BINARY = ?"
    " AND (multibyte_sup IS NOT ? OR multibyte_evidence COLLATE BINARY IS NOT ?)"
)
# What is no number is no known value. A column that was declared as TEXT holds digits.
_NEVER_LOWER = (
    " AND NOT (coalesce(CAST(multibyte_sup AS NUMERIC), 0) > ? AND"
    " (typeof(multibyte_sup) IN ('integer', 'real') OR multibyte_sup NOT GLOB '*[^0-9]*'))"
)


async def apply(
    database: Path,
    values: dict[str, plan.Value],
    ledger: Ledger,
    *,
    news: dict[str, plan.Value] | None = None,
    batch_rows: int,
    downgrade: Downgrade,
    grace: float,
) -> None:
    """Make the rows what `values` says; write down in `ledger` what was done.

    Compares first, without the write lock; then writes only the rows that differ, in batches
    that each hold the lock for as long as they take. What was committed when an error is raised
    stays, and is right. See `reconcile` for the arguments.

    Raises:
        DatabaseMissing, SchemaMissing, ForeignWal, DatabaseBusy, DatabaseFailed: see their
            docstrings.

    """
    async with open_database(database, ledger, grace) as access:
        await reconcile(
            access, database, values, ledger, news=news, batch_rows=batch_rows, downgrade=downgrade
        )


async def reconcile(
    access: Access,
    database: Path,
    values: dict[str, plan.Value],
    ledger: Ledger,
    *,
    news: dict[str, plan.Value] | None = None,
    batch_rows: int,
    downgrade: Downgrade,
) -> None:
    """Do what `apply` does, through a connection that is open already.

    Args:
        access: the way to the rows.
        database: what an error calls it.
        values: by public key.
        ledger: is written.
        news: those of `values` that are likely to differ. Their rows are written before all the
            others are compared, which they then are as well.
        batch_rows: rows per transaction.
        downgrade: whether a stored value may be lowered.

    Raises:
        SchemaMissing: no table can be served.
        sqlite3.Error: anything else.

    """
    tables = await _served_tables(access, database, ledger)
    if news:
        await _pass(access, tables, news, ledger, batch_rows, downgrade)
    for _ in range(MAX_PASSES):
        missed = await _pass(access, tables, values, ledger, batch_rows, downgrade)
        if not missed or ledger.stopped:
            return
    async for table, changes in _differences(access, tables, values, ledger, downgrade):
        for change in changes:
            ledger.failed[table.name, change.public_key] = "an UPDATE leaves it as it is"


async def _pass(
    access: Access,
    tables: Mapping[Table, float],
    values: dict[str, plan.Value],
    ledger: Ledger,
    batch_rows: int,
    downgrade: Downgrade,
) -> int:
    """Compare and write once; return how many rows had changed in between."""
    missed = 0
    differences = _differences(access, tables, values, ledger, downgrade)
    async with contextlib.aclosing(_batches(differences, batch_rows)) as batches:
        async for table, changes in batches:
            if ledger.stopped:
                break
            missed += await _write(access, table, changes, ledger, downgrade)
    return missed


async def preview(
    database: Path,
    values: dict[str, plan.Value],
    ledger: Ledger,
    *,
    downgrade: Downgrade,
    grace: float,
) -> list[tuple[str, plan.Change]]:
    """Return, by table, what `apply` would write; takes no lock and writes nothing.

    Raises:
        DatabaseMissing, SchemaMissing, ForeignWal, DatabaseBusy, DatabaseFailed: see their
            docstrings.

    """
    with open_to_read(database, grace) as access:
        tables = await _served_tables(access, database, ledger)
        differences = _differences(access, tables, values, ledger, downgrade)
        return [(table.name, change) async for table, changes in differences for change in changes]


async def differs(
    database: Path,
    values: dict[str, plan.Value],
    ledger: Ledger,
    *,
    downgrade: Downgrade,
    grace: float,
) -> bool:
    """Return whether any row of the keys in `values` is not as they say; writes nothing.

    Raises:
        DatabaseMissing, SchemaMissing, ForeignWal, DatabaseBusy, DatabaseFailed: see their
            docstrings.

    """
    async with open_database(database, ledger, grace) as access:
        tables = await _served_tables(access, database, ledger)
        pages = [
            changes
            async for _, changes in _differences(access, tables, values, ledger, downgrade)
            if changes
        ]
        return bool(pages)


# ------------------------------------------------------------------------------ reading


async def _served_tables(access: Access, database: Path, ledger: Ledger) -> dict[Table, float]:
    """Return the tables that can be served and have rows, each with its size.

    Never cached: tables may come and go. The size is the largest rowid, which is found at once; it
    counts deleted rows, too, but an upper bound will do. Of a table without rowids it is not known.
    """
    tables, obstacles = schema.served(await access.fetch(schema.PROBE))
    ledger.waiting = obstacles or None
    if not tables:
        raise SchemaMissing(database, obstacles)
    sizes = ", ".join(
        _SIZE.format(table=table.name, row=table.row) if table.has_rowid else "0"
        for table in tables
    )
    [largest] = await access.fetch(f"SELECT {sizes}")
    found = zip(tables, largest, strict=True)
    return {t: size if t.has_rowid else math.inf for t, size in found if size is not None}


async def _is_served(access: Access, table: Table) -> bool:
    """Whether it still can be served: its columns may be dropped between reading and writing."""
    return table in schema.served(await access.fetch(schema.PROBE))[0]


async def _differences(
    access: Access,
    tables: Mapping[Table, float],
    values: dict[str, plan.Value],
    ledger: Ledger,
    downgrade: Downgrade,
) -> AsyncGenerator[tuple[Table, list[plan.Change]]]:
    """Yield the rows that differ, a page at a time: memory is bounded by a page."""
    ledger.matched.clear()
    ledger.failed.clear()
    seen: set[str] = set()
    for table, size in tables.items():
        async with contextlib.aclosing(_pages(access, table, size, values)) as pages:
            async for wanted, rows in pages:
                matched, changes = plan.compare(wanted, rows, downgrade)
                ledger.on_progress()
                ledger.matched[table.name] += len(matched)
                seen.update(matched)
                yield table, changes
                if ledger.stopped:
                    return
    ledger.unmatched = len(values) - len(seen)


async def _pages(
    access: Access, table: Table, size: float, values: dict[str, plan.Value]
) -> AsyncGenerator[tuple[dict[str, plan.Value], list[plan.Row]]]:
    """Yield rows of the table, and the values that they are to be held against.

    The way is chosen by size: the whole table is read where the snapshot covers a good part of
    it, the snapshot's keys are looked up where the table is far larger, or has no rowid to read it
    by. A column that ignores case gives rows of other keys as well: of those of another page, too.
    """
    if size <= SCAN_ROWS_PER_KEY * len(values):
        sql = _SCAN.format(table=table.name, row=table.row)
        after = -math.inf  # every integer may be a rowid
        while rows := await access.fetch(sql, (after, PAGE_ROWS)):
            yield values, rows
            if len(rows) < PAGE_ROWS:
                return
            after = rows[-1][0]
    else:
        items = iter(values.items())
        while page := dict(itertools.islice(items, PAGE_KEYS)):
            wanted = ", ".join("?" * len(page))
            sql = _LOOKUP.format(table=table.name, row=table.row, keys=wanted)
            yield page, await access.fetch(sql, tuple(page))


# ------------------------------------------------------------------------------ writing


async def _batches(
    differences: AsyncGenerator[tuple[Table, list[plan.Change]]], size: int
) -> AsyncGenerator[tuple[Table, list[plan.Change]]]:
    """Gather the changes of many pages into batches of one table and at most `size` rows."""
    pending: dict[Table, list[plan.Change]] = {}
    async with contextlib.aclosing(differences):
        async for table, changes in differences:
            rows = pending.setdefault(table, [])
            rows += changes
            while len(rows) >= size:
                batch = rows[: _fitting(rows, size)]
                yield table, batch
                del rows[: len(batch)]
    for table, rows in pending.items():
        while rows:
            batch = rows[: _fitting(rows, size)]
            yield table, batch
            del rows[: len(batch)]


def _fitting(changes: Sequence[plan.Change], size: int) -> int:
    """Return how many of the changes, at most `size`, make a batch that is written quickly."""
    length = 0
    for count, change in enumerate(changes[:size], 1):
        length += len(change.after[1] or "")
        if length >= BATCH_CHARACTERS:
            return count
    return min(len(changes), size)


async def _write(
    access: Access,
    table: Table,
    changes: Sequence[plan.Change],
    ledger: Ledger,
    downgrade: Downgrade,
) -> int:
    """Write a batch in one transaction; return how many of its rows had changed meanwhile.

    A row that a trigger or a constraint refuses takes its batch down. Halving finds it in a few
    short transactions, and the others are written. Once very many rows were refused, a batch is
    given up as a whole: then it is the table that refuses.
    """
    sql = _UPDATE.format(table=table.name, row=table.row)
    rows: list[tuple[Any, ...]]
    rows = [(*c.after, c.row, c.public_key, *c.after) for c in changes]
    if downgrade == "never":
        sql += _NEVER_LOWER
        rows = [(*row, row[0]) for row in rows]
    ledger.on_progress()
    try:
        changed = await access.write(sql, rows)
    except (sqlite3.Error, UnicodeDecodeError) as exc:
        if not refuses_rows(exc) or not await _is_served(access, table):
            raise
        if len(changes) == 1 or len(ledger.failed) >= MAX_HALVED:
            rows_refused = [(table.name, change.public_key) for change in changes]
            ledger.failed.update(dict.fromkeys(rows_refused, message(exc)))
            return 0
        half = len(changes) // 2
        return await _write(access, table, changes[:half], ledger, downgrade) + await _write(
            access, table, changes[half:], ledger, downgrade
        )
    ledger.changed[table.name] += changed
    return len(changes) - changed
