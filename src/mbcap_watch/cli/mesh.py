"""A synthetic mesh for the demo: a database as CoreScope makes it, and snapshots that change."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from typing import TYPE_CHECKING

from mbcap_watch.snapshot.codec import Entry, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# The two tables of CoreScope, with the columns that matter here and a few that make rows as wide
# as real ones.
_SCHEMA = """
CREATE TABLE {table} (
    public_key TEXT PRIMARY KEY,
    name TEXT,
    role TEXT,
    lat REAL,
    lon REAL,
    last_seen TEXT,
    first_seen TEXT,
    advert_count INTEGER DEFAULT 0,
    multibyte_sup INTEGER NOT NULL DEFAULT 0,
    multibyte_evidence TEXT
)
"""
_INACTIVE_SHARE = 0.1
_STATUSES = (("unknown", None), ("suspected", "path"), ("confirmed", "advert"))
_WEIGHTS = (70, 20, 10)


def keys(nodes: int, seed: int) -> list[str]:
    """Return the public keys of the mesh: 64 hex digits each."""
    source = random.Random(seed)
    return [f"{source.getrandbits(256):064x}" for _ in range(nodes)]


def create_database(path: Path, nodes: int, seed: int) -> None:
    """Create a database in WAL mode with `nodes` nodes, a tenth of them in `inactive_nodes`."""
    inactive = int(nodes * _INACTIVE_SHARE)
    rows = [
        (key, f"node {key[:6]}", "repeater", 52.5, 13.4, "2026-11-01T00:00:00Z", "2026-01-01", 7)
        for key in keys(nodes, seed)
    ]
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = wal")
        for table, part in (("nodes", rows[inactive:]), ("inactive_nodes", rows[:inactive])):
            connection.execute(_SCHEMA.format(table=table))
            connection.executemany(
                f"INSERT INTO {table} (public_key, name, role, lat, lon, last_seen, first_seen,"
                " advert_count) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                part,
            )


def snapshots(nodes: int, count: int, seed: int) -> Iterator[Snapshot]:
    """Yield `count` snapshots; from one to the next about every hundredth node changes."""
    source = random.Random(seed + 1)
    statuses = {key: _pick(source) for key in keys(nodes, seed)}
    for number in range(count):
        if number:
            for key in source.sample(sorted(statuses), max(1, nodes // 100)):
                statuses[key] = _pick(source)
        yield Snapshot(tuple(Entry(key, *status) for key, status in statuses.items()))


def _pick(source: random.Random) -> tuple[str, str | None]:
    return source.choices(_STATUSES, _WEIGHTS)[0]
