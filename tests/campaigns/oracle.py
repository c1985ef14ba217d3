"""What a database has to say after a snapshot, in plain sqlite3."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING, Any

from support import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

Values = tuple[int, str]


class Oracle:
    """Knows the snapshots that were published, and looks into the database.

    Attributes:
        expected: the values that the last snapshot gives.
        valued: the keys that an earlier one has given values.

    """

    def __init__(self, database: Path) -> None:
        self.database = database
        self.expected: dict[str, Values] = {}
        self.valued = set[str]()

    def expect(self, entries: Collection[tuple[str, str, str]]) -> None:
        sups = {"confirmed": 2, "suspected": 1}
        written = [each for each in entries if each[1] in sups]
        self.valued |= self.expected.keys()
        self.expected = {key: (sups[status], evidence) for key, status, evidence in written}

    def read(self, statement: str) -> list[tuple[Any, ...]]:
        """Ask the database over a connection of its own, which only reads."""
        connection = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=DEADLINE)
        with contextlib.closing(connection):
            return connection.execute(statement).fetchall()

    def values(self, keys: Collection[str]) -> dict[str, set[Values]]:
        """Return what each key has, in both tables."""
        columns = "public_key, multibyte_sup, coalesce(multibyte_evidence, '')"
        found: dict[str, set[Values]] = {key: set() for key in keys}
        for key, sup, evidence in self.read(
            f"SELECT {columns} FROM nodes UNION ALL SELECT {columns} FROM inactive_nodes"
        ):
            if key in found:
                found[key].add((sup, evidence))
        return found

    def differing(self) -> dict[str, set[Values]]:
        """Return what is there for each key that has not the value of the last snapshot."""
        found = self.values(self.expected).items()
        return {key: values for key, values in found if values != {self.expected[key]}}

    def blank(self, keys: Collection[str]) -> list[str]:
        """Return which of these keys have lost their value.

        A key that the last snapshot gives none may have an older one than that before it: of two
        daemons, the slower one writes its snapshot when the other has written the next.
        """
        found = self.values(self.valued.intersection(keys)).items()
        return [key for key, values in found if not values or 0 in {sup for sup, _ in values}]
