"""The only SQL: which tables can be served, how their rows are, and writing those that differ."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from mbcap_watch import plan
from mbcap_watch.database import open_database, open_to_read, refuses_rows
from mbcap_watch.errors import SchemaMissing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence
    from pathlib import Path

    from mbcap_watch.database import Access
    from mbcap_watch.ledger import Ledger
    from mbcap_watch.settings import Downgrade

Table = Literal["nodes", "inactive_nodes"]
TABLES: Final = get_args(Table)
COLUMNS: Final = ("public_key", "multibyte_sup", "multibyte_evidence")

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

_PROBE = " UNION ALL ".join(
    f"SELECT '{table}', name FROM pragma_table_info('{table}')" for table in TABLES
)
_SIZE = "(SELECT max(rowid) FROM {table})"
_SCAN = (
    "SELECT rowid, public_key, multibyte_sup, multibyte_evidence FROM {table}"
    " WHERE rowid > ? ORDER BY rowid LIMIT ?"
)
_LOOKUP = (
    "SELECT rowid, public_key, multibyte_sup, multibyte_evidence FROM {table}"
    " WHERE public_key IN ({keys})"
)
# By rowid, because that is fastest under the lock; guarded by the key, because a rowid can be
# given to another node meanwhile; and only if it still differs.
_UPDATE = (
    "UPDATE {table} SET multibyte_sup = ?, multibyte_evidence = ?"
    " WHERE rowid = ? AND public_key = ?"
    " AND (multibyte_sup IS NOT ? OR multibyte_evidence IS NOT ?)"
)
_NEVER_LOWER = " AND (multibyte_sup <= ? OR typeof(multibyte_sup) NOT IN ('integer', 'real'))"

_LEAST_ROWID = -(2**63)


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
            ledger.failed[table, change.public_key] = "an UPDATE leaves it as it is"


async def _pass(
    access: Access,
    tables: Mapping[str, int],
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
        return [(table, change) async for table, changes in differences for change in changes]


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


async def _served_tables(access: Access, database: Path, ledger: Ledger) -> dict[str, int]:
    """Return the tables that have the columns and rows, each with its largest rowid.

    Never cached: tables may come and go. The largest rowid is found at once and counts deleted
    rows, too; as the size of the table, an upper bound will do.
    """
    columns: dict[str, set[str]] = {table: set() for table in TABLES}
    for table, column in await access.fetch(_PROBE):
        columns[table].add(column.lower())
    lacking = []
    for table, found in columns.items():
        if missing := [column for column in COLUMNS if column not in found]:
            lacking.append(f"{table} lacks {', '.join(missing)}" if found else f"no table {table}")
    ledger.waiting = "; ".join(lacking) or None
    if len(lacking) == len(TABLES):
        raise SchemaMissing(database, "; ".join(lacking))
    served = [table for table, found in columns.items() if found.issuperset(COLUMNS)]
    sizes = ", ".join(_SIZE.format(table=table) for table in served)
    [largest] = await access.fetch(f"SELECT {sizes}")
    return {table: size for table, size in zip(served, largest, strict=True) if size is not None}


async def _is_served(access: Access, table: str) -> bool:
    """Whether the table still has the columns: they may be dropped between reading and writing."""
    found = {column.lower() for name, column in await access.fetch(_PROBE) if name == table}
    return found.issuperset(COLUMNS)


async def _differences(
    access: Access,
    tables: Mapping[str, int],
    values: dict[str, plan.Value],
    ledger: Ledger,
    downgrade: Downgrade,
) -> AsyncGenerator[tuple[str, list[plan.Change]]]:
    """Yield the rows that differ, a page at a time: memory is bounded by a page."""
    ledger.matched.clear()
    ledger.failed.clear()
    seen: set[str] = set()
    for table, size in tables.items():
        async with contextlib.aclosing(_pages(access, table, size, values)) as pages:
            async for rows in pages:
                matched, changes = plan.compare(values, rows, downgrade)
                ledger.on_progress()
                ledger.matched[table] += len(matched)
                seen.update(matched)
                yield table, changes
                if ledger.stopped:
                    return
    ledger.unmatched = len(values) - len(seen)


async def _pages(
    access: Access, table: str, size: int, values: dict[str, plan.Value]
) -> AsyncGenerator[list[plan.Row]]:
    """Yield the rows of the table that the snapshot may have a value for.

    The way is chosen by size: the whole table is read where the snapshot covers a good part of
    it, the snapshot's keys are looked up where the table is far larger.
    """
    if size <= SCAN_ROWS_PER_KEY * len(values):
        after = _LEAST_ROWID
        while rows := await access.fetch(_SCAN.format(table=table), (after, PAGE_ROWS)):
            yield rows
            if len(rows) < PAGE_ROWS:
                return
            after = rows[-1][0]
    else:
        keys = iter(values)
        while page := tuple(itertools.islice(keys, PAGE_KEYS)):
            wanted = ", ".join("?" * len(page))
            yield await access.fetch(_LOOKUP.format(table=table, keys=wanted), page)


# ------------------------------------------------------------------------------ writing


async def _batches(
    differences: AsyncGenerator[tuple[str, list[plan.Change]]], size: int
) -> AsyncGenerator[tuple[str, list[plan.Change]]]:
    """Gather the changes of many pages into batches of one table and at most `size` rows."""
    pending: dict[str, list[plan.Change]] = {}
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
    table: str,
    changes: Sequence[plan.Change],
    ledger: Ledger,
    downgrade: Downgrade,
) -> int:
    """Write a batch in one transaction; return how many of its rows had changed meanwhile.

    A row that a trigger or a constraint refuses takes its batch down. Halving finds it in a few
    short transactions, and the others are written. Once very many rows were refused, a batch is
    given up as a whole: then it is the table that refuses.
    """
    sql = _UPDATE.format(table=table)
    rows: list[tuple[Any, ...]]
    rows = [(*c.after, c.rowid, c.public_key, *c.after) for c in changes]
    if downgrade == "never":
        sql += _NEVER_LOWER
        rows = [(*row, row[0]) for row in rows]
    ledger.on_progress()
    try:
        changed = await access.write(sql, rows)
    except sqlite3.Error as exc:
        if not refuses_rows(exc) or not await _is_served(access, table):
            raise
        if len(changes) == 1 or len(ledger.failed) >= MAX_HALVED:
            ledger.failed.update(dict.fromkeys([(table, c.public_key) for c in changes], str(exc)))
            return 0
        half = len(changes) // 2
        return await _write(access, table, changes[:half], ledger, downgrade) + await _write(
            access, table, changes[half:], ledger, downgrade
        )
    ledger.changed[table] += changed
    return len(changes) - changed
