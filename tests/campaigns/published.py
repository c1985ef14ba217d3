"""What was published, and so what each row may hold: the judge of the campaigns that interrupt."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, TypeAlias

from support import connect, make_database, put

if TYPE_CHECKING:
    import random
    import sqlite3
    from pathlib import Path

Value: TypeAlias = "tuple[int, str | None]"
Place: TypeAlias = tuple[str, str]
"""Table and key."""

TABLES: Final = ("nodes", "inactive_nodes")
LEVELS: Final = {"confirmed": 2, "suspected": 1}
UNTOUCHED: Final[Value] = (0, None)


class Published:
    """A database of nodes, and the snapshots that were published for it.

    Each snapshot has values of its own, so that a row tells which snapshot it is from. Some of the
    entries are `unknown`, and some nodes are in both tables.
    """

    def __init__(self, database: Path, nodes: int, dice: random.Random) -> None:
        self.database = database
        self.snapshot = database.parent / "mbcap-snapshot" / "snapshot.json"
        self._dice = dice
        self._keys = [f"{dice.getrandbits(256):064x}" for _ in range(nodes)]
        self._count = 0
        self._may: dict[Place, set[Value]] = {}
        self._must: dict[str, Value] = {}  # what the latest snapshot says
        for key in self._keys:
            for table in dice.choice([TABLES[:1], TABLES[:1], TABLES[1:], TABLES]):
                self._may[table, key] = {UNTOUCHED}
        make_database(database, [(table, key, *UNTOUCHED) for table, key in self._may])

    def publish(self) -> None:
        """Replace the snapshot by rename."""
        self._count += 1
        status = {
            key: self._dice.choice(["confirmed", "confirmed", "suspected", "suspected", "unknown"])
            for key in self._keys
        }
        evidence = f"snapshot {self._count}"
        entries = [{"public_key": k, "status": s, "evidence": evidence} for k, s in status.items()]
        self._must = {k: (LEVELS[s], evidence) for k, s in status.items() if s in LEVELS}
        for (_, key), values in self._may.items():
            if key in self._must:
                values.add(self._must[key])
        put(json.dumps({"entries": entries}).encode(), self.snapshot)

    def judge(self, connection: sqlite3.Connection) -> float:
        """Require each value to be from a snapshot; return which share of the latest is there."""
        rows = read(connection)
        self._require_rows(rows)
        wanted = {place: self._must[place[1]] for place in self._may if place[1] in self._must}
        return sum(rows[place] == value for place, value in wanted.items()) / len(wanted)

    def require_latest(self, connection: sqlite3.Connection) -> None:
        """Require each row to be as the latest snapshot says; what earlier ones allowed is over."""
        rows = read(connection)
        self._require_rows(rows)
        for place in self._may:
            wanted = self._must.get(place[1], rows[place])
            assert rows[place] == wanted, f"{place} is {rows[place]} and has to be {wanted}"
            self._may[place] = {rows[place]}

    def _require_rows(self, rows: dict[Place, Value]) -> None:
        assert rows.keys() >= self._may.keys(), f"lost: {self._may.keys() - rows.keys()}"
        for place, value in rows.items():
            may = self._may.get(place, {UNTOUCHED})
            assert value in may, f"{place} is {value} and can only be one of {may}"

    def is_mixed(self) -> bool:
        """Whether some rows are as the latest snapshot says, and some are not yet."""
        with connect(self.database) as connection:
            return 0 < self.judge(connection) < 1


def read(connection: sqlite3.Connection) -> dict[Place, Value]:
    return {
        (table, key): (level, evidence)
        for table in TABLES
        for key, level, evidence in connection.execute(
            f"SELECT public_key, multibyte_sup, multibyte_evidence FROM {table}"
        )
    }
