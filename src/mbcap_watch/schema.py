"""Which of the two tables can be served, and what is wrong with the others. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable

TableName = Literal["nodes", "inactive_nodes"]
TABLES: Final = get_args(TableName)
COLUMNS: Final = ("public_key", "multibyte_sup", "multibyte_evidence")
_WRITTEN: Final = COLUMNS[1:]

# SQLite's names for the rowid. A column of the same name hides one of them
# (https://www.sqlite.org/rowidtable.html).
_ROWIDS: Final = ("rowid", "_rowid_", "oid")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


# A row for each column of each table, with NULL where there is none. pragma_table_xinfo knows
# generated columns, which pragma_table_info omits. It is not asked about views and virtual tables
# (those have no root page): it would fail if what they refer to is gone. pragma_index_info knows a
# table as an index if it is WITHOUT ROWID (https://www.sqlite.org/pragma.html#pragma_index_info).
PROBE: Final = (
    "SELECT m.name, iif(m.type = 'table' AND NOT m.rootpage, 'virtual table', m.type),"
    " (SELECT count(*) FROM pragma_index_info(m.name)), x.name, x.hidden"
    " FROM sqlite_master AS m LEFT JOIN"
    " pragma_table_xinfo(CASE WHEN m.type = 'table' AND m.rootpage THEN m.name END) AS x"
    f" ON x.name COLLATE NOCASE IN ({_listed((*COLUMNS, *_ROWIDS))})"
    f" WHERE m.type IN ('table', 'view') AND m.name COLLATE NOCASE IN ({_listed(TABLES)})"
)

# What `hidden` is of a generated column, virtual or stored.
_GENERATED: Final = (2, 3)


class Table(NamedTuple):
    """A table that can be served.

    Attributes:
        name: `nodes` or `inactive_nodes`.
        row: the column that tells its rows apart: the rowid by a name that is free, or the key
            if the table has no rowid.

    """

    name: str
    row: str

    @property
    def has_rowid(self) -> bool:
        """Whether the rows can be read in the order of their rowids."""
        return self.row in _ROWIDS


def served(
    answer: Iterable[tuple[str, str, int, str | None, int | None]],
) -> tuple[list[Table], str]:
    """Return the tables that can be served, and for people what keeps the others from it.

    Args:
        answer: what the database says to `PROBE`.

    """
    kinds: dict[str, str] = {}
    clustered: set[str] = set()
    columns: dict[str, dict[str, int | None]] = {table: {} for table in TABLES}
    for name, kind, indexed, column, hidden in answer:
        table = name.lower()
        kinds[table] = kind
        if indexed:
            clustered.add(table)
        if column is not None:
            columns[table][column.lower()] = hidden
    tables, obstacles = [], []
    for table, found in columns.items():
        if obstacle := _obstacle(table, kinds.get(table), found):
            obstacles.append(obstacle)
            continue
        free = [name for name in _ROWIDS if name not in found and table not in clustered]
        tables.append(Table(table, free[0] if free else "public_key"))
    return tables, "; ".join(obstacles)


def _obstacle(table: str, kind: str | None, columns: dict[str, int | None]) -> str | None:
    if kind is None:
        return f"no table {table}"
    if kind != "table":
        return f"{table} is a {kind}, not {'a table' if kind == 'view' else 'an ordinary one'}"
    if missing := [column for column in COLUMNS if column not in columns]:
        return f"{table} lacks {', '.join(missing)}"
    for column in _WRITTEN:
        if columns[column] in _GENERATED:
            return f"{column} of {table} is a generated column and cannot be written"
    return None
