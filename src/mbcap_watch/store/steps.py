"""The steps that `reconcile` takes, as data with all SQL for rows, and what runs them."""

from __future__ import annotations

import contextlib
import sqlite3
import traceback
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias

import msgspec
from anyio.lowlevel import checkpoint_if_cancelled

from mbcap_watch.settings import MAX_BATCH_ROWS
from mbcap_watch.store.plan import Page

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence

    from mbcap_watch.settings import Downgrade
    from mbcap_watch.store.plan import Change

# ------------------------------------------------------------------------------ tables

# Always those of `main`: a host's connection may have temporary tables or views of these names,
# which come first, and others in databases that it has attached.
TABLES: Final = ("nodes", "inactive_nodes")
COLUMNS: Final = ("public_key", "multibyte_sup", "multibyte_evidence")

# SQLite's names for the rowid. A column of the same name hides one of them
# (https://www.sqlite.org/rowidtable.html).
_ROWIDS: Final = ("rowid", "_rowid_", "oid")

# Of each table: what it is; whether it is WITHOUT ROWID (then pragma_index_info knows it as an
# index); its columns; and one to be written that is generated. pragma_table_xinfo knows generated
# columns, which pragma_table_info omits. It is not asked about views and virtual tables (they have
# no root page): it would fail if what they refer to is gone.
PROBE: Final = (
    "SELECT lower(m.name), iif(m.type = 'table' AND NOT m.rootpage, 'virtual table', m.type),"
    " (SELECT count(*) FROM pragma_index_info(m.name, 'main')), group_concat(lower(x.name)),"
    " min(iif(x.hidden IN (2, 3) AND x.name LIKE 'multibyte%', lower(x.name), NULL))"
    " FROM sqlite_master AS m LEFT JOIN"
    " pragma_table_xinfo(CASE WHEN m.type = 'table' AND m.rootpage THEN m.name END, 'main') AS x"
    f" ON x.name COLLATE NOCASE IN {(*COLUMNS, *_ROWIDS)}"
    f" WHERE m.type IN ('table', 'view') AND m.name COLLATE NOCASE IN {TABLES} GROUP BY m.name"
)


class Table(NamedTuple):
    """A table that can be served, and the column that tells its rows apart.

    That is the rowid, by a name that is free, or the key if the table has no rowid.
    """

    name: str
    row: str

    @property
    def has_rowid(self) -> bool:
        """Whether the rows can be read in the order of their rowids."""
        return self.row in _ROWIDS


def served(
    answer: Iterable[tuple[str, str, int, str | None, str | None]],
) -> tuple[list[Table], str]:
    """Return the tables that can be served, by the answer to `PROBE`, and what the others lack."""
    found = {table: about for table, *about in answer}
    tables, obstacles = [], []
    for table in TABLES:
        kind, clustered, names, generated = found.get(table, ("", 0, "", ""))
        columns = str(names).split(",")
        missing = [column for column in COLUMNS if column not in columns]
        if not kind:
            obstacles.append(f"no table {table}")
        elif kind != "table":
            proper = "a table" if kind == "view" else "an ordinary one"
            obstacles.append(f"{table} is a {kind}, not {proper}")
        elif missing:
            obstacles.append(f"{table} lacks {', '.join(missing)}")
        elif generated:
            obstacles.append(f"{generated} of {table} is a generated column and cannot be written")
        else:
            free = [name for name in _ROWIDS if name not in columns and not clustered]
            tables.append(Table(table, free[0] if free else "public_key"))
    return tables, "; ".join(obstacles)


# ------------------------------------------------------------------------------ steps

# How many rows a scan by rowid may come to. Below 0 there may be any number, all in one page.
SIZE: Final = (
    "(SELECT iif((SELECT min({row}) FROM main.{table}) < 0, 9e999,"
    " (SELECT max({row}) FROM main.{table})))"
)
_ROWS: Final = (
    "SELECT {row} AS id, public_key AS key, multibyte_sup AS sup, multibyte_evidence AS evidence"
    " FROM main.{table}"
)
# Not LIMIT: as a subquery with a limit, a page takes half as long again.
SCAN: Final = _ROWS + " WHERE {row} > ? AND {row} <= ?"
NEWER: Final = _ROWS + " WHERE {row} >= ? ORDER BY {row} LIMIT ?"
LOOKUP: Final = _ROWS + " WHERE public_key IN ({keys})"

# One statement is one transaction, which nothing can tear: neither a cancellation nor a thread
# that waits for the GIL holds the lock any longer. By rowid, because that is fastest under the
# lock; guarded by the key, because a rowid can be given to another node meanwhile; and only if
# the row still differs, byte for byte, whatever collation the columns have.
_UPDATE: Final = (
    "WITH wanted(id, key, sup, evidence) AS (VALUES {rows}) UPDATE main.{table}"
    " SET multibyte_sup = wanted.sup, multibyte_evidence = wanted.evidence FROM wanted"
    " WHERE {table}.{row} = wanted.id AND {table}.public_key COLLATE BINARY = wanted.key"
    " AND (multibyte_sup IS NOT wanted.sup"
    " OR multibyte_evidence COLLATE BINARY IS NOT wanted.evidence)"
)
# What is no number is no known value. A column that was declared as TEXT holds digits.
_NEVER_LOWER: Final = (
    " AND NOT (coalesce(CAST(multibyte_sup AS NUMERIC), 0) > wanted.sup AND"
    " (typeof(multibyte_sup) IN ('integer', 'real') OR multibyte_sup NOT GLOB '*[^0-9]*'))"
)
CHANGES: Final = "SELECT changes()"


class Query(NamedTuple):
    """A step that reads; it is sent the rows, as a list of tuples, or as a `Page` of nodes."""

    sql: str
    parameters: Sequence[Any] = ()
    is_page: bool = False


class Write(NamedTuple):
    """A step that writes a batch, as one short transaction; it is sent a `Written`."""

    table: Table
    changes: Sequence[Change]
    downgrade: Downgrade

    def statement(self) -> tuple[str, list[Any]]:
        """Return the one statement that writes the batch, and its parameters.

        The number of rows is rounded up to a power of two, with rows that match nothing, so that
        a connection has few different statements to prepare and to keep.
        """
        count = len(self.changes)
        padded = min(1 << (count - 1).bit_length(), MAX_BATCH_ROWS)
        rows = ", ".join(["(?, ?, ?, ?)"] * padded)
        sql = _UPDATE.format(table=self.table.name, row=self.table.row, rows=rows)
        if self.downgrade == "never":
            sql += _NEVER_LOWER
        parameters: list[Any] = []
        for change in self.changes:
            parameters += (change.row, change.public_key, *change.after)
        parameters += [None] * (4 * (padded - count))
        return sql, parameters


class Written(NamedTuple):
    """What became of a batch: how many rows it changed, and what refused the others."""

    rows: int
    error: sqlite3.Error | UnicodeDecodeError | None = None


Steps: TypeAlias = "Generator[Query | Write, Any, None]"


class Access(Protocol):
    """What runs single steps over a connection."""

    async def query(self, step: Query) -> list[Any] | Page:
        """Return all rows, as plain tuples or as a page."""

    async def write(self, step: Write) -> Written:
        """Write the batch; an error that is not about single rows is raised."""


class Preview:
    """Runs the steps that read over `access`, and keeps what the others would have written."""

    def __init__(self, access: Access) -> None:
        self.query = access.query
        self.changes: list[tuple[str, Change]] = []

    async def write(self, step: Write) -> Written:
        """Keep the batch."""
        self.changes += [(step.table.name, change) for change in step.changes]
        return Written(len(step.changes))


async def run_steps(
    steps: Steps, access: Access, on_step: Callable[[], None] = lambda: None
) -> None:
    """Run all steps over `access`, and call `on_step` after each.

    A cancellation takes effect between two steps. What was committed by then stays.
    """
    answer: Any = None
    with contextlib.suppress(StopIteration):
        while True:
            await checkpoint_if_cancelled()
            step = steps.send(answer)
            if isinstance(step, Query):
                answer = await access.query(step)
            else:
                answer = await access.write(step)
            on_step()


def preview_steps(steps: Steps, connection: sqlite3.Connection) -> list[tuple[str, Change]]:
    """Run only the steps that read; return, by table, what the others would have written."""
    changes: list[tuple[str, Change]] = []
    answer: Any = None
    with contextlib.suppress(StopIteration):
        while True:
            step = steps.send(answer)
            if isinstance(step, Query):
                answer = connection.execute(step.sql, step.parameters).fetchall()
                answer = Page(*list(zip(*answer, strict=True))) if step.is_page else answer
            else:
                changes += [(step.table.name, change) for change in step.changes]
                answer = Written(len(step.changes))
    return changes


# ------------------------------------------------------------------------------ pages

_COLUMNS: Final = ("id", "key", "sup", "evidence")
_AS_TEXT: Final = f"SELECT {', '.join(f'json_group_array({c})' for c in _COLUMNS)} FROM ({{sql}})"
# Text has the encoding of the database, as a BLOB, too.
_typed = [
    f"iif(typeof({c}) = 'text', CAST({c} AS BLOB), {c}), iif(typeof({c}) = 'text', encoding, NULL)"
    for c in _COLUMNS
]
_AS_BYTES: Final = f"SELECT {', '.join(_typed)} FROM ({{sql}}), pragma_encoding"
# Nothing else is in a column: from 3.45 on, SQLite takes a BLOB such as x'0b' for a JSON list.
_decode = msgspec.json.Decoder(list[int | float | str | None]).decode


async def read_page(
    fetch: Callable[[str, Sequence[Any]], Awaitable[list[Any]]], step: Query
) -> list[Any] | Page:
    """Return what a step asks for; each column of a page is read as a single JSON text.

    Python takes the GIL once for it, and not once a row: beside a host thread that is busy in
    Python, 2,000 rows take 15 ms instead of 688. A page with text that is not UTF-8, or with a
    BLOB, is read once more, the text as bytes.
    """
    if not step.is_page:
        return await fetch(step.sql, step.parameters)
    try:
        [columns] = await fetch(_AS_TEXT.format(sql=step.sql), step.parameters)
        return Page(*[_decode(column) for column in columns])
    except (sqlite3.OperationalError, msgspec.DecodeError) as exc:
        code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        if code not in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_TOOBIG):
            raise
        # Its frames hold a cursor in the middle of its rows, which would pin the WAL.
        traceback.clear_frames(exc.__traceback__)
    rows = await fetch(_AS_BYTES.format(sql=step.sql), step.parameters)
    return Page(*list(zip(*(map(_text, row[::2], row[1::2]) for row in rows), strict=True)))


def _text(value: Any, encoding: str | None) -> Any:
    if encoding is None:
        return value
    return value.decode(encoding, "surrogateescape" if encoding == "UTF-8" else "replace")
