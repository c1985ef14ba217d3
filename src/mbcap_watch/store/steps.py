"""The steps that `reconcile` takes, as data with their SQL, and what runs them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias

from anyio.lowlevel import checkpoint_if_cancelled

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Generator, Sequence

    from mbcap_watch.settings import Downgrade
    from mbcap_watch.store.plan import Change

TABLES: Final = ("nodes", "inactive_nodes")
COLUMNS: Final = ("public_key", "multibyte_sup", "multibyte_evidence")

# A statement takes 32,766 parameters (https://www.sqlite.org/limits.html), and four are a row's.
MAX_BATCH_ROWS: Final = 8_000

PROBE = " UNION ALL ".join(
    f"SELECT '{table}', name FROM pragma_table_info('{table}')" for table in TABLES
)
SIZE = "(SELECT max(rowid) FROM {table})"
_ROWS = (
    "SELECT rowid AS id, public_key AS key, multibyte_sup AS sup, multibyte_evidence AS evidence"
    " FROM {table}"
)
SCAN = _ROWS + " WHERE rowid > ? ORDER BY rowid LIMIT ?"
LOOKUP = _ROWS + " WHERE public_key IN ({keys})"
_AS_TEXT = "SELECT json_group_array(json_array(id, key, sup, evidence)) FROM ({sql})"

# One statement is one transaction, which nothing can tear: neither a cancellation nor a thread
# that waits for the GIL holds the lock any longer. By rowid, because that is fastest under the
# lock; guarded by the key, because a rowid can be given to another node meanwhile; and only if
# the row still differs.
_UPDATE = (
    "WITH wanted(id, key, sup, evidence) AS (VALUES {rows}) UPDATE {table}"
    " SET multibyte_sup = wanted.sup, multibyte_evidence = wanted.evidence FROM wanted"
    " WHERE {table}.rowid = wanted.id AND {table}.public_key = wanted.key"
    " AND (multibyte_sup IS NOT wanted.sup OR multibyte_evidence IS NOT wanted.evidence)"
)
_NEVER_LOWER = (
    " AND (multibyte_sup <= wanted.sup OR typeof(multibyte_sup) NOT IN ('integer', 'real'))"
)
CHANGES: Final = "SELECT changes()"


class Query(NamedTuple):
    """A step that reads; it is sent the rows, as a list of tuples.

    Attributes:
        sql: the statement.
        parameters: its parameters.
        pages: whether it reads a page of nodes, which `as_text` can read as one value.

    """

    sql: str
    parameters: Sequence[Any] = ()
    pages: bool = False

    def as_text(self) -> str:
        """Return the SQL that reads the same page as a single JSON text.

        Python takes the GIL once for it, and not once a row: beside a host thread that is busy in
        Python, 2,000 rows take 15 ms instead of 688.
        """
        return _AS_TEXT.format(sql=self.sql)


class Write(NamedTuple):
    """A step that writes a batch, as one short transaction; it is sent a `Written`."""

    table: str
    changes: Sequence[Change]
    downgrade: Downgrade

    def statement(self) -> tuple[str, list[Any]]:
        """Return the one statement that writes the batch, and its parameters.

        The number of rows is rounded up to a power of two, with rows that match nothing, so that
        a connection has few different statements to prepare and to keep.
        """
        count = len(self.changes)
        padded = min(1 << (count - 1).bit_length(), MAX_BATCH_ROWS)
        sql = _UPDATE.format(table=self.table, rows=", ".join(["(?, ?, ?, ?)"] * padded))
        if self.downgrade == "never":
            sql += _NEVER_LOWER
        parameters: list[Any] = []
        for change in self.changes:
            parameters += (change.rowid, change.public_key, *change.after)
        parameters += [None] * (4 * (padded - count))
        return sql, parameters


class Written(NamedTuple):
    """What became of a batch: how many rows it changed, and what refused the others."""

    rows: int
    error: sqlite3.Error | None = None


Steps: TypeAlias = "Generator[Query | Write, Any, None]"


class Access(Protocol):
    """What runs single steps over a connection."""

    async def query(self, step: Query) -> list[Any]:
        """Return all rows, as plain tuples."""

    async def write(self, step: Write) -> Written:
        """Write the batch; an error that is not about single rows is raised."""


async def run_steps(
    steps: Steps, access: Access, on_step: Callable[[], None] = lambda: None
) -> None:
    """Run all steps over `access`. What was committed when an error is raised stays.

    A cancellation takes effect between two steps.

    Args:
        steps: from `reconcile`.
        access: to the rows.
        on_step: called after each step.

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
            else:
                changes += [(step.table, change) for change in step.changes]
                answer = Written(len(step.changes))
    return changes
