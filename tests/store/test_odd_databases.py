"""Databases that SQLite allows and nobody expects: each is served, or named for what it is."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, Any

import aiosqlite
import pytest

from mbcap_watch import Entry, Settings, Snapshot, apply_snapshot, persist_once, snapshot_path
from mbcap_watch.bridge.run import preview_once
from mbcap_watch.store import plan
from processes import call
from support import (
    apply,
    bridge,
    connect,
    document,
    make_database,
    other_process,
    put,
    read_line,
    read_rows,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

COLUMNS = "multibyte_sup INTEGER NOT NULL DEFAULT 0, multibyte_evidence TEXT"
INACTIVE = f"CREATE TABLE inactive_nodes (public_key TEXT PRIMARY KEY, {COLUMNS})"
FILLER = 60  # with so many rows more, the keys of a small snapshot are looked up


def make(path: Path, *statements: str, keys: Iterable[object] = (), filler: int = 0) -> Path:
    """Make a database of these tables, with rows for `keys` in `nodes`."""
    with connect(path) as connection:
        connection.execute("PRAGMA journal_mode = wal")
        for statement in statements:
            connection.execute(statement)
        connection.execute("BEGIN")
        for key in (*keys, *(f"filler {number}" for number in range(filler))):
            connection.execute("INSERT INTO nodes (public_key) VALUES (?)", (key,))
        connection.execute("COMMIT")
    return path


def stored(database: Path) -> list[tuple[Any, ...]]:
    """Return key, value and evidence of the rows of `nodes` that are not filler, in any order."""
    with connect(database) as connection:
        rows = connection.execute(
            "SELECT public_key, multibyte_sup, multibyte_evidence FROM nodes"
            " WHERE public_key IS NULL OR public_key NOT LIKE 'filler%'"
        ).fetchall()
    return sorted(rows, key=repr)


# ------------------------------------------------------------------------------ kinds of tables

SERVED = {
    "rowid is a column": f"nodes (public_key TEXT PRIMARY KEY, rowid TEXT DEFAULT 'x', {COLUMNS})",
    "two of its names are": f"nodes (public_key TEXT PRIMARY KEY, RowID TEXT, _rowid_, {COLUMNS})",
    "all its names are": f"nodes (public_key TEXT PRIMARY KEY, rowid, _rowid_, oid, {COLUMNS})",
    "rowid is generated": f"nodes (public_key TEXT PRIMARY KEY, rowid AS (name), name, {COLUMNS})",
    "rowid is the primary key": f"nodes (rowid INTEGER PRIMARY KEY, public_key TEXT, {COLUMNS})",
    "another column is": f"nodes (id INTEGER PRIMARY KEY, public_key TEXT UNIQUE, {COLUMNS})",
    "no rowid": f"nodes (public_key TEXT PRIMARY KEY, {COLUMNS}) WITHOUT ROWID",
    "no rowid, but a column": (
        f"nodes (public_key TEXT, rowid TEXT DEFAULT '', {COLUMNS},"
        " PRIMARY KEY (rowid, public_key)) WITHOUT ROWID"
    ),
    "letter case": (
        'Nodes (PUBLIC_KEY TEXT PRIMARY KEY, "Multibyte_SUP" INTEGER NOT NULL DEFAULT 0,'
        " Multibyte_Evidence TEXT)"
    ),
    "keys ignore case": f"nodes (public_key TEXT PRIMARY KEY COLLATE NOCASE, {COLUMNS})",
    "both": f"nodes (public_key TEXT PRIMARY KEY COLLATE NOCASE, {COLUMNS}) WITHOUT ROWID",
    "no index": f"nodes (public_key TEXT, {COLUMNS})",
    "strict": f"nodes (public_key TEXT PRIMARY KEY, {COLUMNS}) STRICT",
    "key is generated": f"nodes (name TEXT, public_key AS (name) STORED, {COLUMNS})",
}


@pytest.mark.parametrize("filler", [0, FILLER], ids=["scan", "lookup"])
@pytest.mark.parametrize("table", SERVED.values(), ids=SERVED.keys())
async def test_every_table_that_can_be_served_is(tmp_path: Path, table: str, filler: int) -> None:
    database = make(tmp_path / "m.db", f"CREATE TABLE {table}", INACTIVE)
    names = [*("aa11", "BB22", "cc33"), *(f"filler {number}" for number in range(filler))]
    with connect(database) as connection:
        key = "name" if "STORED" in table else "public_key"
        connection.executemany(f"INSERT INTO nodes ({key}) VALUES (?)", [(n,) for n in names])
        connection.execute("INSERT INTO inactive_nodes (public_key) VALUES ('aa11')")
    entries = [("aa11", "confirmed", "advert"), ("bb22", "confirmed"), ("cc33", "suspected")]

    result = await apply(database, *entries)

    assert (result.outcome, result.error) == ("applied", None)
    assert (result.matched_active, result.changed_active, result.unmatched) == (2, 2, 1)
    assert result.changed_inactive == 1
    assert stored(database) == [("BB22", 0, None), ("aa11", 2, "advert"), ("cc33", 1, "")]
    again = await apply(database, *entries)
    assert (again.outcome, again.error, again.lock_seconds) == ("unchanged", None, 0.0)


@pytest.mark.parametrize("rowid", [-(2**63), -1, 0, 2**63 - 1])
@pytest.mark.parametrize("filler", [0, FILLER], ids=["scan", "lookup"])
async def test_every_integer_may_be_a_rowid(tmp_path: Path, rowid: int, filler: int) -> None:
    database = make(
        tmp_path / "m.db",
        f"CREATE TABLE nodes (public_key TEXT PRIMARY KEY, {COLUMNS})",
        INACTIVE,
        filler=filler,
    )
    with connect(database) as connection:
        connection.execute("INSERT INTO nodes (rowid, public_key) VALUES (?, 'aa11')", (rowid,))

    result = await apply(database, ("aa11", "confirmed"), ("none", "confirmed"))

    assert (result.changed_active, result.failed_rows, result.unmatched) == (1, 0, 1)


@pytest.mark.parametrize("filler", [0, FILLER], ids=["scan", "lookup"])
@pytest.mark.parametrize("declared", ["public_key PRIMARY KEY", "public_key TEXT PRIMARY KEY"])
async def test_a_key_of_another_type_is_no_key_of_a_snapshot(
    tmp_path: Path, declared: str, filler: int
) -> None:
    """NULL may be there many times; bytes and numbers equal no text, whatever they look like."""
    odd = [None, None, b"aa11", b"\xff", 5.5, "text"]
    odd += [5] if "TEXT" not in declared else []  # it would be the text '5'
    database = make(
        tmp_path / "m.db",
        f"CREATE TABLE nodes ({declared}, {COLUMNS})",
        INACTIVE,
        keys=odd,
        filler=filler,
    )

    result = await apply(
        database, *((key, "confirmed", "x") for key in ("aa11", "5", "text", "", "None"))
    )

    assert (result.outcome, result.failed_rows) == ("applied", 0)
    assert [row[0] for row in stored(database) if row[2] == "x"] == ["text"]


@pytest.mark.slow
async def test_keys_in_both_cases_are_each_their_own(tmp_path: Path) -> None:
    """The column takes them for equal, and more of them are looked up than fit into one query."""
    lower = [f"a{number:04}" for number in range(1200)]
    keys = [*lower, *(key.upper() for key in lower)]
    database = make(
        tmp_path / "m.db",
        f"CREATE TABLE nodes (public_key TEXT COLLATE NOCASE, {COLUMNS})",
        "CREATE INDEX by_key ON nodes (public_key)",
        INACTIVE,
        keys=keys,
        filler=5 * len(keys),
    )

    result = await apply(database, *((key, "confirmed", key) for key in keys))

    assert (result.matched_active, result.changed_active) == (len(keys), len(keys))
    assert (result.failed_rows, result.unmatched) == (0, 0)
    assert stored(database) == sorted((key, 2, key) for key in keys)


# ------------------------------------------------------------------------------ not to be served

GENERATED = "INTEGER GENERATED ALWAYS AS (0)"
NOT_SERVED = {
    "view": (
        ["CREATE TABLE t (k)", "CREATE VIEW nodes AS SELECT * FROM t"],
        "nodes is a view, not a table",
    ),
    "view of what is gone": (
        ["CREATE VIEW nodes AS SELECT * FROM gone"],
        "nodes is a view, not a table",
    ),
    "view with the columns": (
        [f"CREATE TABLE t (public_key, {COLUMNS})", "CREATE VIEW nodes AS SELECT * FROM t"],
        "nodes is a view, not a table",
    ),
    "virtual table": (
        ["CREATE VIRTUAL TABLE nodes USING fts5(public_key, multibyte_sup, multibyte_evidence)"],
        "nodes is a virtual table",
    ),
    "virtual table of an unknown module": (
        [
            "PRAGMA writable_schema = 1",
            "INSERT INTO sqlite_master SELECT 'table', 'nodes', 'nodes', 0,"  # noqa: ISC004
            " 'CREATE VIRTUAL TABLE nodes USING nowhere(x)'",
        ],
        "nodes is a virtual table",
    ),
    "generated": (
        [f"CREATE TABLE nodes (public_key, multibyte_evidence, multibyte_sup {GENERATED})"],
        "multibyte_sup of nodes is a generated column and cannot be written",
    ),
    "generated and stored": (
        [f"CREATE TABLE nodes (public_key, multibyte_sup, multibyte_evidence {GENERATED} STORED)"],
        "multibyte_evidence of nodes is a generated column and cannot be written",
    ),
    "no columns": (
        ["CREATE TABLE nodes (id)"],
        "nodes lacks public_key, multibyte_sup, multibyte_evidence",
    ),
    "a name that is not the name": (
        [f"CREATE TABLE nodes (public_\u212aey, {COLUMNS})"],  # the Kelvin sign, k in lower case
        "nodes lacks public_key",
    ),
    "no key": ([f"CREATE TABLE nodes (id, {COLUMNS})"], "nodes lacks public_key"),
    "nothing": ([], "no table nodes"),
}


@pytest.mark.parametrize("statements, text", NOT_SERVED.values(), ids=NOT_SERVED.keys())
async def test_what_cannot_be_served_is_named_and_the_other_table_is(
    tmp_path: Path, statements: list[str], text: str
) -> None:
    database = make(tmp_path / "m.db", *statements, INACTIVE)
    with connect(database) as connection:
        connection.execute("INSERT INTO inactive_nodes (public_key) VALUES ('aa11')")
    put(document(("aa11", "confirmed")), snapshot_path(database))

    previewed, changes = await preview_once(Settings(database=database))
    result = await persist_once(Settings(database=database))

    for each in (previewed, result):
        assert (each.outcome, each.changed_inactive, each.changed_active) == ("applied", 1, 0)
        assert text in str(each.error)
    assert len(changes) == 1
    with connect(database) as connection:
        connection.execute("DROP TABLE inactive_nodes")
    alone = await persist_once(Settings(database=database))
    assert alone.outcome == "schema_missing"
    assert text in str(alone.error)


async def test_a_view_is_a_state_to_wait_in(tmp_path: Path) -> None:
    database = make(tmp_path / "m.db", "CREATE VIEW nodes AS SELECT * FROM gone", INACTIVE)
    put(document(("aa11", "confirmed")), snapshot_path(database))
    async with bridge(database, sweep_interval="50ms") as results:
        await results.next("unchanged")
        with connect(database) as connection:
            connection.execute("DROP VIEW nodes")
            connection.execute(f"CREATE TABLE nodes (public_key TEXT PRIMARY KEY, {COLUMNS})")
            connection.execute("INSERT INTO nodes (public_key) VALUES ('aa11')")
        assert (await results.next("applied")).error is None


# ------------------------------------------------------------------------------ rows that refuse

KEYS = ("aa11", "bb22", "cc33", "dd44", "ee55")


def refuse(database: Path, action: str) -> None:
    """Have a trigger refuse the row of dd44, in words that are not UTF-8.

    RAISE takes a literal only, and Python sends UTF-8: the byte is put into the schema afterwards.
    """
    with connect(database) as connection:
        connection.execute(
            "CREATE TRIGGER t BEFORE UPDATE ON nodes WHEN OLD.public_key = 'dd44'"
            f" BEGIN SELECT RAISE({action}, 'no @'); END"
        )
        connection.execute("PRAGMA writable_schema = 1")
        connection.execute(
            "UPDATE sqlite_master SET sql = CAST(replace(CAST(sql AS BLOB), '@', x'fffe') AS TEXT)"
            " WHERE name = 't'"
        )


@pytest.mark.parametrize("action", ["ABORT", "FAIL", "ROLLBACK"])
async def test_a_row_that_is_refused_in_words_that_are_not_utf8(
    tmp_path: Path, action: str
) -> None:
    database = make_database(tmp_path / "m.db", [("nodes", key, 0, None) for key in KEYS])
    refuse(database, action)

    result = await apply(database, *((key, "confirmed", "new") for key in KEYS))

    assert (result.outcome, result.changed_active, result.failed_rows) == ("applied", 4, 1)
    assert "dd44" in str(result.error)
    assert r"no \xff\xfe" in str(result.error)
    assert {row[1] for row in read_rows(database) if row[3] == "new"} == {*KEYS} - {"dd44"}

    async with aiosqlite.connect(database) as connection:
        await connection.execute("UPDATE nodes SET multibyte_sup = 0 WHERE public_key <> 'dd44'")
        await connection.commit()
        snapshot = Snapshot(tuple(Entry(key, "confirmed", "new") for key in KEYS))
        result = await apply_snapshot(connection, snapshot, lock=asyncio.Lock())
        assert (result.outcome, result.changed_active, result.failed_rows) == ("applied", 4, 1)
        assert not connection.in_transaction


@pytest.mark.parametrize(
    "columns",
    [
        "multibyte_sup INTEGER, multibyte_evidence TEXT CHECK (multibyte_evidence <> 'no')",
        "multibyte_sup INTEGER, multibyte_evidence TEXT CHECK (json(multibyte_evidence) <> 'no')",
        "multibyte_sup INTEGER, multibyte_evidence TEXT UNIQUE",
    ],
    ids=["check", "check that fails", "unique"],
)
async def test_a_constraint_stops_one_row(tmp_path: Path, columns: str) -> None:
    database = make(
        tmp_path / "m.db", f"CREATE TABLE nodes (public_key, {columns})", INACTIVE, keys=KEYS
    )
    words = dict(zip(KEYS, ["1", "2", "3", "no", "5"], strict=True))
    if "UNIQUE" in columns:
        words["dd44"] = "1"
    result = await apply(database, *((key, "confirmed", word) for key, word in words.items()))

    assert (result.outcome, result.changed_active, result.failed_rows) == ("applied", 4, 1)
    assert sum(row[1] == 2 for row in stored(database)) == 4


async def test_a_search_index_that_is_out_of_step_stops_one_row(tmp_path: Path) -> None:
    """SQLite calls it SQLITE_CORRUPT_VTAB: the database is sound."""
    database = make(
        tmp_path / "m.db",
        f"CREATE TABLE nodes (public_key, {COLUMNS})",
        INACTIVE,
        "CREATE VIRTUAL TABLE found USING fts5 (public_key, content = 'nodes')",
        "CREATE TRIGGER t AFTER UPDATE ON nodes WHEN OLD.public_key = 'dd44' BEGIN"
        " INSERT INTO found (found, rowid, public_key)"
        " VALUES ('delete', OLD.rowid, OLD.public_key); END",
        keys=KEYS,
    )
    result = await apply(database, *((key, "confirmed") for key in KEYS))
    assert (result.outcome, result.changed_active, result.failed_rows) == ("applied", 4, 1)


async def test_a_strict_table_that_takes_no_number(tmp_path: Path) -> None:
    columns = "public_key TEXT, multibyte_sup BLOB, multibyte_evidence TEXT"
    database = make(
        tmp_path / "m.db", f"CREATE TABLE nodes ({columns}) STRICT", INACTIVE, keys=KEYS
    )
    with connect(database) as connection:
        connection.execute("INSERT INTO inactive_nodes (public_key) VALUES ('aa11')")
    result = await apply(database, *((key, "confirmed") for key in KEYS))

    assert (result.changed_active, result.changed_inactive, result.failed_rows) == (0, 1, 5)
    assert "BLOB" in str(result.error)


# ------------------------------------------------------------------------------ values as stored

SUP = ["INTEGER", "TEXT", "NUMERIC", "REAL", "BLOB", "VARCHAR(8) COLLATE NOCASE"]
EVIDENCE = ["TEXT", "TEXT COLLATE NOCASE", "TEXT COLLATE RTRIM", "BLOB", "INTEGER", "REAL", "ANY"]
SUPS = [None, 0, 1, 2, 3, "1", "2", "3", "abc", "", "2 ", 1.5, b"2", b"\0"]
EVIDENCES = [None, "", "advert", "ADVERT", "advert ", b"advert", 5, "5", "None"]
WANTED = [("confirmed", "advert"), ("suspected", "advert"), ("suspected", ""), ("confirmed", "5")]
WANTED += [("confirmed", "None"), ("confirmed", "05"), ("suspected", "5e0")]


def number(value: Any) -> float:
    """Return the number that a value is, digits as text included; 0 if it is none."""
    if isinstance(value, (str, bytes)) and not value.isdigit():
        return 0
    return float(value or 0)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["allow", "never"])
@pytest.mark.parametrize(
    "sup, evidence",
    [*((sup, "TEXT") for sup in SUP), *(("INTEGER", evidence) for evidence in EVIDENCE[1:])],
)
async def test_whatever_is_stored_becomes_what_is_wanted_and_stays(
    tmp_path: Path, sup: str, evidence: str, policy: str
) -> None:
    """Python and SQL agree on what differs: nothing is refused, and nothing is written twice."""
    database = make(
        tmp_path / "m.db",
        "CREATE TABLE nodes (public_key TEXT PRIMARY KEY,"
        f" multibyte_sup {sup}, multibyte_evidence {evidence})",
        INACTIVE,
    )
    before = [(s, e) for s in SUPS for e in EVIDENCES]
    wanted = {f"{n} {w}": (b, w) for n, b in enumerate(before) for w in WANTED}
    with connect(database) as connection:
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO nodes VALUES (?, ?, ?)", [(k, *b) for k, (b, _) in wanted.items()]
        )
        connection.execute("COMMIT")
        held = {key: value for key, value, _ in stored(database)}
    entries = [(key, *want) for key, (_, want) in wanted.items()]

    result = await apply(database, *entries, downgrade=policy)

    assert (result.outcome, result.failed_rows, result.error) == ("applied", 0, None)
    assert result.matched_active == len(wanted)
    again = await apply(database, *entries, downgrade=policy)
    assert (again.outcome, again.lock_seconds) == ("unchanged", 0.0)
    for key, value, text in stored(database):
        status, word = wanted[key][1]
        after = {"confirmed": 2, "suspected": 1}[status]
        if policy == "never" and number(held[key]) > after:
            assert value == held[key]
        else:
            assert number(value) == after
            assert text == (float(word) if isinstance(text, (int, float)) else word)


# ------------------------------------------------------------------------------ bytes, not text

FLIPS = {
    "the name of a table": (b"nodesnodes", b"nod\xe5snodes"),
    "its definition": (b"nodes (public_key", b"nodes \xa8public_key"),
}


@pytest.mark.parametrize("old, new", FLIPS.values(), ids=FLIPS.keys())
async def test_one_flipped_bit_in_the_schema_is_an_outcome(
    tmp_path: Path, old: bytes, new: bytes
) -> None:
    """SQLite quotes what it finds there, which is no longer UTF-8."""
    database = make_database(tmp_path / "m.db", [("nodes", "aa11", 0, None)])
    sound = database.read_bytes()
    broken = sound.replace(old, new)
    assert broken != sound
    database.write_bytes(broken)
    put(document(("aa11", "confirmed")), snapshot_path(database))

    for arguments in (["apply"], ["apply", "--dry-run"], ["check"]):
        done = call(*arguments, "--database", database)
        text = done.stdout + done.stderr
        assert done.returncode not in (0, 2), text
        assert "Traceback" not in text
        assert "corrupt" in text
    assert database.read_bytes() == broken

    async with aiosqlite.connect(database) as connection:
        snapshot = Snapshot((Entry("aa11", "confirmed"),))
        result = await apply_snapshot(connection, snapshot, lock=asyncio.Lock())
        assert (result.outcome, result.cause) == ("failed", "corrupt")

    async with bridge(database, sweep_interval="50ms") as results:
        assert (await results.next("failed")).cause == "corrupt"
        database.write_bytes(sound)
        await results.next("applied")
    assert ("nodes", "aa11", 2, "") in read_rows(database)


@pytest.mark.parametrize("filler", [0, FILLER], ids=["scan", "lookup"])
async def test_text_that_is_not_utf8_is_in_nobodys_way_on_the_hosts_connection(
    tmp_path: Path, filler: int
) -> None:
    database = make(
        tmp_path / "m.db",
        f"CREATE TABLE nodes (public_key TEXT PRIMARY KEY, {COLUMNS})",
        INACTIVE,
        keys=["aa11", "bb22", "cc33", b"dd44", b"\xff", None],
        filler=filler,
    )
    with connect(database) as connection:
        connection.execute("UPDATE nodes SET multibyte_evidence = CAST(x'ff41' AS TEXT)")
        connection.execute(
            "UPDATE nodes SET public_key = CAST(x'fe' AS TEXT) WHERE public_key = 'bb22'"
        )
        connection.execute(
            "UPDATE nodes SET multibyte_sup = CAST(x'fd' AS TEXT) WHERE public_key = 'cc33'"
        )
    keys = ("aa11", "bb22", "cc33", "dd44", "ÿ")
    snapshot = Snapshot(tuple(Entry(key, "confirmed", "advert") for key in keys))

    async with aiosqlite.connect(database) as connection:
        lock = asyncio.Lock()
        result = await apply_snapshot(connection, snapshot, lock=lock)
        again = await apply_snapshot(connection, snapshot, lock=lock)
        assert connection.text_factory is str

    assert (result.outcome, result.changed_active, result.unmatched) == ("applied", 2, 3)
    assert (again.outcome, again.failed_rows) == ("unchanged", 0)
    with connect(database) as connection:
        rows = connection.execute("SELECT public_key FROM nodes WHERE multibyte_sup = 2").fetchall()
    assert {key for (key,) in rows} == {"aa11", "cc33"}


@pytest.mark.parametrize("encoding", ["UTF-16le", "UTF-16be"])
async def test_a_blob_beside_text_in_utf16(tmp_path: Path, encoding: str) -> None:
    """The page is read as bytes, which are not UTF-8; half a surrogate pair is no text at all."""
    database = tmp_path / "m.db"
    with connect(database) as connection:
        connection.execute(f"PRAGMA encoding = '{encoding}'")
        connection.execute("CREATE TABLE other (x)")  # from now on it is kept
    half = bytes.fromhex("d800" if encoding == "UTF-16be" else "00d8")
    keys = ["aa11", "\xe9\U0001f600", "inactive", b"aa11"]
    table = f"CREATE TABLE nodes (public_key TEXT PRIMARY KEY, {COLUMNS})"
    make(database, table, INACTIVE, keys=keys)
    with connect(database) as connection:
        connection.execute("INSERT INTO nodes (public_key) VALUES (CAST(? AS TEXT))", (half,))
    entries = [(key, "confirmed", "advert") for key in keys[:2] if isinstance(key, str)]

    result = await apply(database, *entries)

    assert (result.outcome, result.matched_active, result.changed_active) == ("applied", 2, 2)
    async with aiosqlite.connect(database) as connection:
        snapshot = Snapshot(tuple(Entry(*entry) for entry in [*entries, ("inactive", "suspected")]))
        result = await apply_snapshot(connection, snapshot, lock=asyncio.Lock())
        assert (result.matched_active, result.changed_active, result.failed_rows) == (3, 1, 0)
    assert (await apply(database, *entries)).outcome == "unchanged"


async def test_a_read_that_the_host_did_not_finish_is_named(database: Path) -> None:
    snapshot = Snapshot((Entry("aa11", "confirmed"),))
    lock = asyncio.Lock()
    async with aiosqlite.connect(database, timeout=0.1) as connection:
        cursor = await connection.execute("SELECT * FROM nodes")
        await cursor.fetchone()
        with connect(database, timeout=0.1) as other:  # the cursor keeps it from tidying up
            other.execute("UPDATE nodes SET name = 'newer'")
        result = await apply_snapshot(connection, snapshot, lock=lock)
        assert result.outcome == "busy"
        assert "the host's connection" in str(result.error)
        assert "cursor" in str(result.error)
        assert "another" not in str(result.error)
        await cursor.close()
        assert (await apply_snapshot(connection, snapshot, lock=lock)).outcome == "applied"


# ------------------------------------------------------------------------------ the unforeseen


@pytest.fixture(params=["desired_state", "compare"])
def broken(request: pytest.FixtureRequest) -> Iterator[pytest.MonkeyPatch]:
    """A step that fails as no file can make it fail (none is known)."""

    numbers = itertools.count()

    def fail(*_: object) -> None:
        raise LookupError(f"a bug, number {next(numbers)}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, request.param, fail)
        yield patch


async def test_an_unforeseen_error_is_an_outcome_and_logged_once(
    database: Path, broken: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "mbcap_watch")
    async with bridge(database, sweep_interval="20ms", poll_interval="20ms") as results:
        put(document(("aa11", "confirmed")), snapshot_path(database))
        assert "LookupError: a bug" in str((await results.next("failed")).error)
        await results.count("failed", 2)
        (record,) = caplog.records
        assert record.exc_info is not None
        assert record.exc_info[0] is LookupError
        broken.undo()
        await results.next("applied")
    assert ("nodes", "aa11", 2, "") in read_rows(database)


async def test_an_unforeseen_error_of_a_single_look(
    database: Path, broken: pytest.MonkeyPatch
) -> None:
    put(document(("aa11", "confirmed")), snapshot_path(database))
    previewed, changes = await preview_once(Settings(database))
    for result in (previewed, await persist_once(Settings(database))):
        assert (result.outcome, "LookupError: a bug" in str(result.error)) == ("failed", True)
    assert not changes
    broken.undo()
    assert (await persist_once(Settings(database))).outcome == "applied"


async def test_a_lack_of_memory_is_an_outcome(database: Path) -> None:
    """SQLite asks for a gigabyte, for a trigger, where there is less."""
    put(document(("aa11", "confirmed")), snapshot_path(database))
    with connect(database) as connection:
        connection.execute(
            "CREATE TRIGGER t BEFORE UPDATE ON nodes BEGIN SELECT randomblob(999999999); END"
        )
    script = """
        import asyncio, resource, sys
        from mbcap_watch import Settings, persist_once
        resource.setrlimit(resource.RLIMIT_AS, (900 << 20, resource.RLIM_INFINITY))
        print(asyncio.run(persist_once(Settings(database=sys.argv[1]))).to_json(), flush=True)
    """
    with other_process(script, str(database)) as process:
        line = read_line(process)
    assert '"outcome":"failed"' in line
    assert "MemoryError" in line
    await until(lambda: ("nodes", "aa11", 0, None) in read_rows(database))
