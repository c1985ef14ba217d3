"""Random damage to a database ends in an outcome: no exit, no hang, and no byte more is changed."""

from __future__ import annotations

import logging
import random
import re
import sqlite3
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, get_args

import anyio

from campaigns.campaign import Campaign
from mbcap_watch import Settings, persist_once, snapshot_path
from mbcap_watch.bridge.run import preview_once
from mbcap_watch.results import Outcome
from support import DEADLINE, connect, document, put

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mbcap_watch import PersistResult

PAGE: Final = 4096

# As CoreScope has it, shortened: indexes, a view, a trigger and text of all kinds around the two
# tables, so that there is something to be damaged.
SCHEMA = """
CREATE TABLE nodes (public_key TEXT PRIMARY KEY, name TEXT, role TEXT, lat REAL, lon REAL,
  last_seen TEXT, first_seen TEXT, advert_count INTEGER DEFAULT 0, battery_mv INTEGER,
  multibyte_sup INTEGER NOT NULL DEFAULT 0, multibyte_evidence TEXT);
CREATE TABLE inactive_nodes (public_key TEXT PRIMARY KEY, name TEXT, role TEXT, lat REAL, lon REAL,
  last_seen TEXT, first_seen TEXT, advert_count INTEGER DEFAULT 0, battery_mv INTEGER,
  multibyte_sup INTEGER NOT NULL DEFAULT 0, multibyte_evidence TEXT);
CREATE TABLE observers (id TEXT PRIMARY KEY, name TEXT, iata TEXT, packet_count INTEGER DEFAULT 0);
CREATE TABLE transmissions (id INTEGER PRIMARY KEY AUTOINCREMENT, raw_hex TEXT NOT NULL,
  hash TEXT NOT NULL UNIQUE, first_seen TEXT NOT NULL, decoded_json TEXT);
CREATE TABLE _migrations (name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE INDEX idx_nodes_last_seen ON nodes(last_seen);
CREATE INDEX idx_nodes_sup ON nodes(multibyte_sup) WHERE multibyte_sup > 0;
CREATE INDEX idx_inactive_nodes_last_seen ON inactive_nodes(last_seen);
CREATE INDEX idx_tx_first_seen ON transmissions(first_seen);
CREATE VIEW known AS SELECT public_key, name FROM nodes WHERE multibyte_sup > 0;
CREATE TRIGGER counted AFTER UPDATE OF advert_count ON nodes WHEN NEW.advert_count < 0
  BEGIN SELECT RAISE(ABORT, 'a count below zero'); END;
INSERT INTO _migrations VALUES ('multibyte_v1');
"""
NODES = [f"{number:064x}" for number in range(300)]


def make(path: Path) -> tuple[bytes, bytes]:
    """Make a database in which a third is to be changed; return it, and a WAL that goes with it."""
    with connect(path) as connection:
        connection.execute("PRAGMA journal_mode = wal")
        connection.executescript(SCHEMA)
        connection.execute("BEGIN")
        for number, key in enumerate(NODES):
            table = "inactive_nodes" if number % 5 == 0 else "nodes"
            connection.execute(
                f"INSERT INTO {table} (public_key, name, lat, last_seen, multibyte_sup,"
                " multibyte_evidence) VALUES (?, ?, ?, ?, ?, ?)",
                (key, f"Knoten 🔑 {number}", number / 7, f"2026-{number}", number % 3, "path"),
            )
            connection.execute(
                "INSERT INTO transmissions (raw_hex, hash, first_seen) VALUES (?, ?, ?)",
                (key * (1 + number % 90), key, f"2026-{number}"),
            )
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        data = path.read_bytes()
        connection.execute("UPDATE nodes SET advert_count = advert_count + 1, name = name || '!'")
        return data, path.with_name(path.name + "-wal").read_bytes()


# ------------------------------------------------------------------------------ kinds of damage

Damage = bytearray


def flip_bits(data: Damage, dice: random.Random) -> None:
    for _ in range(dice.choice([1, 1, 2, 8])):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def flip_bits_of_schema(data: Damage, dice: random.Random) -> None:
    """In the first pages: the text of the schema, and what surrounds it."""
    for _ in range(dice.choice([1, 1, 1, 3])):
        data[dice.randrange(min(len(data), 2 * PAGE))] ^= 1 << dice.randrange(8)


def flip_bits_of_text(data: Damage, dice: random.Random) -> None:
    """In a statement of the schema, which SQLite parses and quotes."""
    start = dice.choice([found.start() for found in re.finditer(b"CREATE ", data)])
    data[start + dice.randrange(200)] ^= 1 << dice.choice([0, 1, 2, 5, 7, 7, 7])


def change_header(data: Damage, dice: random.Random) -> None:
    data[dice.randrange(100)] = dice.randrange(256)


def change_page_header(data: Damage, dice: random.Random) -> None:
    page = dice.randrange(1, len(data) // PAGE)
    data[page * PAGE + dice.randrange(16)] = dice.randrange(256)


def write_noise(data: Damage, dice: random.Random) -> None:
    size, start = dice.choice([1, 4, 64, 1000]), dice.randrange(len(data))
    data[start : start + size] = dice.randbytes(size)


def replace_page(data: Damage, dice: random.Random) -> None:
    pages = len(data) // PAGE
    start, other = (dice.randrange(pages) * PAGE for _ in range(2))
    page = dice.choice([bytes(PAGE), dice.randbytes(PAGE), data[other : other + PAGE]])
    data[start : start + PAGE] = page


def zero_the_end(data: Damage, dice: random.Random) -> None:
    start = dice.randrange(len(data) // PAGE) * PAGE
    data[start:] = bytes(len(data) - start)


def cut(data: Damage, dice: random.Random) -> None:
    del data[dice.choice([dice.randrange(len(data)), dice.randrange(len(data) // PAGE) * PAGE]) :]


DAMAGES: list[Callable[[Damage, random.Random], None]] = [
    flip_bits,
    flip_bits_of_schema,
    flip_bits_of_text,
    change_header,
    change_page_header,
    write_noise,
    replace_page,
    zero_the_end,
    cut,
]
DAMAGES_OF_WAL = [flip_bits, write_noise, zero_the_end, cut]


def damaged(dice: random.Random, made: bytes, wal: bytes) -> tuple[bytes, bytes | None]:
    """Return a damaged database, and the WAL beside it, if there is one."""
    data, frames = Damage(made), Damage(wal)
    with_wal = dice.random() < 0.2
    if with_wal:
        dice.choice(DAMAGES_OF_WAL)(frames, dice)
    if not with_wal or dice.random() < 0.3:
        dice.choice(DAMAGES)(data, dice)
    return bytes(data), bytes(frames) if with_wal else None


def contents(database: Path) -> dict[tuple[str, str], tuple[Any, Any]] | None:
    """Return the other columns of each row, and its values; None if the database is not sound."""
    found: dict[tuple[str, str], tuple[Any, Any]] = {}
    try:  # without a -wal, and leaving none
        with connect(f"{database.as_uri()}?immutable=1", uri=True) as connection:
            if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                return None
            for table in ("nodes", "inactive_nodes"):
                for key, *row in connection.execute(f"SELECT {COLUMNS} FROM {table}"):
                    found[table, key] = tuple(row[:-2]), tuple(row[-2:])
    except (sqlite3.Error, UnicodeDecodeError):
        return None
    return found


COLUMNS = "public_key, name, role, lat, lon, last_seen, advert_count, multibyte_sup"
COLUMNS += ", multibyte_evidence"


class Unforeseen(logging.Handler):
    """Keeps the errors that a sync did not foresee; it logs only those as errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    made, wal = make(base / "made.db")
    database, log = base / "m.db", base / "m.db-wal"
    settings = Settings(database=database, busy_deadline=0, wal_grace=0)
    entries = [
        (key, "confirmed" if n % 2 else "suspected", "advert") for n, key in enumerate(NODES)
    ]
    values = {key: (1 + (status == "confirmed"), said) for key, status, said in entries}
    put(document(*entries), snapshot_path(database))
    logging.getLogger("mbcap_watch").addHandler(unforeseen := Unforeseen())
    tally, dice = Counter[str](), random.Random(number)
    for _ in range(min(wanted, 500)):
        data, frames = damaged(dice, made, wal)
        for side in ("-wal", "-shm", "-journal"):
            database.with_name(database.name + side).unlink(missing_ok=True)
        if frames is not None:
            log.write_bytes(frames)
        database.write_bytes(data)
        before = contents(database) if frames is None else None
        previewed, result = anyio.run(both, settings, data)

        assert {previewed.outcome, result.outcome} <= set(get_args(Outcome))
        assert unforeseen.said == []
        # Whoever writes beside a WAL that was left behind moves that into the database as well.
        if frames is None and not result.changed:
            assert database.read_bytes() == data
        if before is not None:
            after = contents(database)
            assert after is not None
            assert {row: beside for row, (beside, _) in after.items()} == {
                row: beside for row, (beside, _) in before.items()
            }
            if result.compared and result.error is None:  # else it tells of what it could not
                odd = [
                    (row, value)
                    for row, (_, value) in after.items()
                    if value != values.get(row[1], before[row][1])
                ]
                assert odd == [], (odd[:5], result)
                tally["sound before, and as the snapshot says after"] += 1
        tally["databases"] += 1
        tally[result.outcome] += 1

    database.write_bytes(made)
    log.unlink(missing_ok=True)
    assert anyio.run(persist_once, settings).outcome == "applied"
    with connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return tally


async def both(settings: Settings, data: bytes) -> tuple[PersistResult, PersistResult]:
    """Preview what would be changed, which changes nothing; then change it."""
    with anyio.fail_after(DEADLINE):
        previewed, _ = await preview_once(settings)
        assert settings.database.read_bytes() == data
        return previewed, await persist_once(settings)


CAMPAIGN = Campaign(
    about="damaged databases: each call returns an outcome; a database that was not written is"
    " untouched, a sound one holds the values",
    unit="databases",
    full=50_000,
    short=50,
    play=play,
)
