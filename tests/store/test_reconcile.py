"""The database side: real SQLite in WAL mode, real other processes."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import sqlite3
import subprocess
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import msgspec
import pytest

from mbcap_watch import DatabaseFailed, PersistResult, Settings, persist_once, snapshot_path
from mbcap_watch.bridge.run import preview_once
from mbcap_watch.store import reconcile, steps
from mbcap_watch.store.connection import Database, open_database
from mbcap_watch.store.plan import Change, Page
from mbcap_watch.store.reconcile import Tally
from mbcap_watch.store.steps import Table
from support import (
    apply,
    connect,
    document,
    has_open,
    locked,
    make_database,
    other_process,
    put,
    read_line,
    read_rows,
    until,
)

if TYPE_CHECKING:
    from pathlib import Path

    from mbcap_watch.settings import Downgrade
    from mbcap_watch.store.plan import Value

NODES, INACTIVE = Table("nodes", "rowid"), Table("inactive_nodes", "rowid")
HALF = reconcile.BATCH_CHARACTERS // 2

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


def wal_size(database: Path) -> int:
    path = database.with_name(database.name + "-wal")
    return path.stat().st_size if path.exists() else -1


# ------------------------------------------------------------------------------ what is written


async def test_a_key_in_both_tables_is_updated_in_both(database: Path) -> None:
    result = await apply(database, ("ee55", "confirmed", "advert"))

    assert (result.outcome, result.changed_active, result.changed_inactive) == ("applied", 1, 1)
    assert {row for row in read_rows(database) if row[1] == "ee55"} == {
        ("nodes", "ee55", 2, "advert"),
        ("inactive_nodes", "ee55", 2, "advert"),
    }


async def test_the_counts_tell_everything_apart(database: Path) -> None:
    result = await apply(
        database,
        ("aa11", "confirmed", "advert"),
        ("bb22", "suspected", "path"),
        ("cc33", "confirmed", "advert"),
        ("dd44", "unknown"),
        ("ee55", "Confirmed"),
        ("0000", "confirmed"),
    )

    assert result.entries == 6
    assert (result.skipped_unknown, result.skipped_unrecognized) == (1, 1)
    assert (result.matched_active, result.matched_inactive, result.unmatched) == (2, 1, 1)
    assert (result.changed_active, result.changed_inactive, result.failed_rows) == (1, 1, 0)
    assert result.lock_seconds > 0


@pytest.mark.parametrize("policy, sup", [("allow", 1), ("never", 2)])
async def test_a_downgrade_is_written_unless_told_otherwise(
    database: Path, policy: str, sup: int
) -> None:
    await apply(database, ("cc33", "suspected", "path"), downgrade=policy)

    assert ("nodes", "cc33", sup, "path" if sup == 1 else "advert") in read_rows(database)


async def test_unchanged_costs_no_lock_and_no_byte(database: Path) -> None:
    entries = [("aa11", "confirmed", "advert"), ("ee55", "suspected", "path")]
    with connect(database) as other:
        other.execute("SELECT * FROM nodes").fetchall()  # keeps the WAL in place
        await apply(database, *entries)
        before = wal_size(database)
        with locked(database):  # and a lock that somebody holds is no obstacle
            result = await apply(database, *entries)

        assert (result.outcome, result.lock_seconds) == ("unchanged", 0.0)
        assert wal_size(database) == before
        assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


async def test_the_journal_mode_stays_what_it_is(tmp_path: Path) -> None:
    database = make_database(
        tmp_path / "meshcore.db", [("nodes", "aa11", 0, None)], journal_mode="delete"
    )
    result = await apply(database, ("aa11", "confirmed"))

    assert result.outcome == "applied"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mbcap-snapshot", "meshcore.db"]
    with connect(database) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


async def test_a_path_with_all_kinds_of_characters(tmp_path: Path) -> None:
    directory = tmp_path / "100% ?mode=memory #1 über"
    directory.mkdir()
    database = make_database(directory / "mesh core.db", [("nodes", "aa11", 0, None)])

    assert (await apply(database, ("aa11", "confirmed"))).outcome == "applied"


@pytest.mark.parametrize(
    "key", ["", " aa11", "AA11", "aa11\0", "'; DROP TABLE nodes; --", "ключ🔑", "\u212a"]
)
async def test_keys_compare_byte_for_byte(tmp_path: Path, key: str) -> None:
    database = make_database(
        tmp_path / "m.db", [("nodes", "aa11", 0, None), ("inactive_nodes", key, 0, None)]
    )
    result = await apply(database, (key, "confirmed", "advert"))

    assert (result.matched_active, result.changed_inactive) == (0, 1)
    assert read_rows(database) == {("nodes", "aa11", 0, None), ("inactive_nodes", key, 2, "advert")}


async def test_text_in_the_database_that_is_not_utf8_is_in_nobodys_way(database: Path) -> None:
    with connect(database) as connection:
        connection.execute("UPDATE nodes SET multibyte_evidence = CAST(x'ff41' AS TEXT)")
        connection.execute("UPDATE nodes SET public_key = CAST(x'fe' AS TEXT) WHERE rowid = 2")
    result = await apply(database, ("aa11", "confirmed", "advert"))

    assert (result.outcome, result.changed_active) == ("applied", 1)


# ------------------------------------------------------------------------------ two ways to read


ROWS = 1000
KEYS = [f"{number:064x}" for number in range(ROWS)]


@pytest.mark.parametrize("ratio", [0, 10**9], ids=["lookup", "scan"])
@pytest.mark.parametrize("page", [1, 7, 2000])
async def test_both_ways_to_compare_find_the_same(tmp_path: Path, ratio: int, page: int) -> None:
    pages = reconcile.Pages(rows=page, keys=min(page, 900), rows_per_key=ratio)
    database = make_database(
        tmp_path / "m.db",
        [("nodes" if n % 3 else "inactive_nodes", key, n % 3, None) for n, key in enumerate(KEYS)],
    )
    wanted: dict[str, Value] = {key: (n % 2 + 1, "e") for n, key in enumerate(KEYS) if n % 5 == 0}
    tally = Tally()
    work = reconcile.reconcile(
        database, {**wanted, "none": (1, "")}, tally, batch_rows=13, downgrade="allow", pages=pages
    )
    async with open_database(database, tally, 0.0) as access:
        await steps.run_steps(work, access)

    after = {key: (sup, evidence) for _, key, sup, evidence in read_rows(database)}
    assert after == {key: wanted.get(key, (n % 3, None)) for n, key in enumerate(KEYS)}
    assert tally.changed.total() == tally.matched.total() == len(wanted)
    assert tally.unmatched == 1


@pytest.mark.parametrize("moved", [0, -ROWS // 2, -ROWS, -(2**60), 2**60])
async def test_a_page_is_small_wherever_the_rowids_are(tmp_path: Path, moved: int) -> None:
    database = make_database(tmp_path / "m.db", [("nodes", key, 0, None) for key in KEYS])
    with connect(database) as connection:
        for step in (2**61, moved - 2**61):  # not by way of each other's
            connection.execute("UPDATE nodes SET rowid = rowid + ?", (step,))
    sizes = []

    class Measured(NamedTuple):
        access: Database

        async def query(self, step: steps.Query) -> Any:
            answer = await self.access.query(step)
            sizes.append(len(answer.ids) if isinstance(answer, Page) else 0)
            return answer

        async def write(self, step: steps.Write) -> steps.Written:
            return await self.access.write(step)

    tally, pages = Tally(), reconcile.Pages(rows=100, keys=100)
    wanted: dict[str, Value] = dict.fromkeys(KEYS, (2, ""))
    work = reconcile.reconcile(
        database, wanted, tally, batch_rows=500, downgrade="allow", pages=pages
    )
    async with open_database(database, tally, 0.0) as access:
        await steps.run_steps(work, Measured(access))
    assert max(sizes) <= 100
    assert tally.changed["nodes"] == len(KEYS)


async def test_the_delta_is_written_first_and_the_rest_all_the_same(tmp_path: Path) -> None:
    """The delta says in which order, and nothing else: here it names one key and half is new."""
    database = make_database(tmp_path / "m.db", [("nodes", key, 0, None) for key in KEYS])
    wanted: dict[str, Value] = dict.fromkeys(KEYS[::2], (2, "e"))
    first = KEYS[-2]
    with connect(database) as connection:
        connection.execute("CREATE TABLE written (key TEXT)")
        connection.execute(
            "CREATE TRIGGER tell AFTER UPDATE ON nodes"
            " BEGIN INSERT INTO written VALUES (new.public_key); END"
        )
    tally = Tally()
    work = reconcile.reconcile(
        database,
        wanted,
        tally,
        delta={first: wanted[first], "none": (1, "")},
        batch_rows=500,
        downgrade="allow",
    )
    async with open_database(database, tally, 0.0) as access:
        await steps.run_steps(work, access)

    with connect(database) as connection:
        order = [key for (key,) in connection.execute("SELECT key FROM written ORDER BY rowid")]
    assert order == [first, *(key for key in wanted if key != first)]
    assert tally.changed.total() == tally.matched.total() == len(wanted)
    assert tally.unmatched == 0


async def test_no_statement_scans_a_table_for_a_handful_of_keys(database: Path) -> None:
    by_rowid = "SEARCH nodes USING INTEGER PRIMARY KEY (rowid"
    change = Change(1, "aa11", (0, None), (2, ""))
    plans = {
        f"SELECT {steps.SIZE}": "SEARCH nodes",
        steps.SCAN: by_rowid + ">? AND rowid<?)",
        steps.LOOKUP: "SEARCH nodes USING INDEX sqlite_autoindex_nodes_1 (public_key=?)",
        steps.Write(NODES, [change] * 3, "allow").statement()[0]: by_rowid + "=?)",
        steps.Write(NODES, [change] * 500, "never").statement()[0]: by_rowid + "=?)",
    }
    with connect(database) as connection:
        for sql, expected in plans.items():
            statement = sql.format(table="nodes", row="rowid", keys="?, ?, ?")
            parameters = [None] * statement.count("?")
            details = connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            said = [row[3].replace("main.", "") for row in details]
            reads = {read for read in said if read.startswith(("SCAN", "SEARCH"))}
            of_tables = {read for read in reads if "CONSTANT ROW" not in read} - {"SCAN wanted"}
            assert of_tables == {expected}


# ------------------------------------------------------------------------------ states to wait in


async def test_no_database_is_never_created(tmp_path: Path) -> None:
    result = await apply(tmp_path / "m.db", ("aa11", "confirmed"))

    assert result.outcome == "database_missing"
    assert str(tmp_path / "m.db") in str(result.error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mbcap-snapshot"]


COLUMNS = [
    (table, column)
    for table in ("nodes", "inactive_nodes")
    for column in ("multibyte_sup", "multibyte_evidence")
]


@pytest.mark.parametrize(
    "present",
    list(itertools.product([True, False], repeat=4)),
    ids=lambda p: "".join("01"[x] for x in p),
)
async def test_any_subset_of_the_columns(database: Path, present: tuple[bool, ...]) -> None:
    """Served is the table that has both; the columns may come at any time."""
    with connect(database) as connection:
        for (table, column), there in zip(COLUMNS, present, strict=True):
            if not there:
                connection.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        result = await apply(database, ("aa11", "confirmed"), ("bb22", "confirmed"))
        active, inactive = all(present[:2]), all(present[2:])

        assert result.outcome == ("applied" if active or inactive else "schema_missing")
        assert (result.changed_active, result.changed_inactive) == (int(active), int(inactive))
        for (_, column), there in zip(COLUMNS, present, strict=True):
            assert there or column in str(result.error)

        for (table, column), there in zip(COLUMNS, present, strict=True):
            if not there:
                kind = "INTEGER NOT NULL DEFAULT 0" if column == "multibyte_sup" else "TEXT"
                connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
    healed = await apply(database, ("aa11", "confirmed"), ("bb22", "confirmed"))

    assert healed.error is None
    assert {("nodes", "aa11", 2, ""), ("inactive_nodes", "bb22", 2, "")} < read_rows(database)


@pytest.mark.parametrize("tables", ["nodes", "inactive_nodes", "both"])
async def test_tables_that_are_not_there(database: Path, tables: str) -> None:
    with connect(database) as connection:
        for table in ("nodes", "inactive_nodes"):
            if tables in (table, "both"):
                connection.execute(f"DROP TABLE {table}")
    result = await apply(database, ("aa11", "confirmed"), ("bb22", "confirmed"))

    assert result.outcome == ("schema_missing" if tables == "both" else "applied")
    missing = ["nodes", "inactive_nodes"] if tables == "both" else [tables]
    assert "; ".join(f"no table {table}" for table in missing) in str(result.error)


async def test_an_empty_file_is_a_database_without_tables(tmp_path: Path) -> None:
    (tmp_path / "m.db").write_bytes(b"")

    assert (await apply(tmp_path / "m.db", ("aa11", "confirmed"))).outcome == "schema_missing"
    assert (tmp_path / "m.db").stat().st_size == 0


async def test_not_a_database(tmp_path: Path) -> None:
    (tmp_path / "m.db").write_bytes(b"hello" * 1000)
    result = await apply(tmp_path / "m.db", ("aa11", "confirmed"))

    assert result.outcome == "failed"
    assert "not an SQLite database" in str(result.error)


async def test_a_directory_in_place_of_the_database(tmp_path: Path) -> None:
    (tmp_path / "m.db").mkdir()
    result = await apply(tmp_path / "m.db", ("aa11", "confirmed"))

    assert (result.outcome, "not a regular file" in str(result.error)) == ("failed", True)


async def test_a_corrupt_database(tmp_path: Path) -> None:
    database = make_database(tmp_path / "m.db", [("nodes", key, 0, None) for key in KEYS])
    with open(database, "r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * 16384)
    result = await apply(database, *((key, "confirmed") for key in KEYS))

    assert (result.outcome, "corrupt" in str(result.error)) == ("failed", True)


# ------------------------------------------------------------------------------ rows that refuse


async def test_one_bad_row_does_not_stop_the_others(tmp_path: Path) -> None:
    database = make_database(tmp_path / "m.db", [("nodes", key, 0, None) for key in KEYS])
    bad = KEYS[123]
    with connect(database) as connection:
        connection.execute(
            f"CREATE TRIGGER t BEFORE UPDATE ON nodes WHEN OLD.public_key = '{bad}'"
            " BEGIN SELECT RAISE(ABORT, 'not this one'); END"
        )
    entries = [(key, "confirmed") for key in KEYS]
    result = await apply(database, *entries)

    assert (result.outcome, result.changed_active, result.failed_rows) == ("applied", ROWS - 1, 1)
    assert bad in str(result.error)
    assert "not this one" in str(result.error)
    assert {row[1] for row in read_rows(database) if row[2] == 0} == {bad}

    again = await apply(database, *entries)
    assert (again.outcome, again.changed_active, again.failed_rows) == ("failed", 0, 1)

    with connect(database) as connection:
        connection.execute("DROP TRIGGER t")
    assert (await apply(database, *entries)).changed_active == 1


async def test_a_row_that_a_trigger_leaves_as_it_is_counts_as_refused(database: Path) -> None:
    with connect(database) as connection:
        connection.execute(
            "CREATE TRIGGER t BEFORE UPDATE ON nodes WHEN OLD.public_key = 'dd44'"
            " BEGIN SELECT RAISE(IGNORE); END"
        )
    result = await apply(
        database, *((key, "confirmed", "new") for key in ("aa11", "cc33", "dd44", "ee55"))
    )

    assert (result.outcome, result.failed_rows) == ("applied", 1)
    assert "dd44" in str(result.error)
    assert {row[1] for row in read_rows(database) if row[3] == "new"} == {"aa11", "cc33", "ee55"}


# ------------------------------------------------------------------------------ neighbours


async def test_busy_until_the_deadline(database: Path) -> None:
    with locked(database):
        result = await apply(database, ("aa11", "confirmed"), busy_deadline=0.3)

    assert (result.outcome, result.changed_active) == ("busy", 0)
    assert "locked" in str(result.error)


async def test_a_lock_that_is_released_in_time_costs_nothing(database: Path) -> None:
    with locked(database) as release:
        put(document(("aa11", "confirmed")), snapshot_path(database))
        results: list[PersistResult] = []
        async with anyio.create_task_group() as group:

            async def persist() -> None:
                results.append(await persist_once(Settings(database=database)))

            group.start_soon(persist)
            await until(lambda: has_open(database), "an attempt to get the lock")
            assert not results
            release()

    assert (results[0].outcome, results[0].changed_active) == ("applied", 1)


NEIGHBOUR = """
    import select, sqlite3, sys, time
    connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("CREATE TABLE IF NOT EXISTS packets (id INTEGER PRIMARY KEY, t REAL)")
    print("ready", flush=True)
    count = 0
    while not select.select([sys.stdin], [], [], 0.001)[0]:
        connection.execute("INSERT INTO packets (t) VALUES (?)", (time.monotonic(),))
        count += 1
    connection.close()
    print(count, flush=True)
"""


async def test_a_writer_that_never_rests_is_never_refused(tmp_path: Path) -> None:
    """Its own busy timeout, five seconds as in CoreScope, is never over."""
    keys = [f"{number:064x}" for number in range(20_000)]
    database = make_database(tmp_path / "m.db", [("nodes", key, 0, None) for key in keys])
    with other_process(NEIGHBOUR, str(database)) as neighbour:
        assert read_line(neighbour) == "ready"
        result = await apply(database, *((key, "confirmed", "advert") for key in keys))
        assert neighbour.stdin is not None
        neighbour.stdin.close()
        assert int(read_line(neighbour)) > 0

    assert (result.outcome, result.changed_active) == ("applied", len(keys))
    assert {row[2] for row in read_rows(database)} == {2}


async def test_a_database_that_is_replaced_is_never_written_through_the_old_file(
    database: Path, tmp_path: Path
) -> None:
    """The file changes under an open connection: the batch is given up, the next look is right."""
    backup = tmp_path / "backup.db"
    shutil.copy(database, backup)
    put(document(("aa11", "confirmed")), snapshot_path(database))
    old = tmp_path / "old.db"
    os.link(database, old)
    change = Change(1, "aa11", (0, None), (2, ""))

    async with open_database(database, Tally(), 0.0) as access:
        os.replace(backup, database)
        with pytest.raises(DatabaseFailed, match="replaced"):
            await access.write(steps.Write(NODES, [change], "allow"))

    assert {row[2] for row in read_rows(old)} == {row[2] for row in read_rows(database)}
    assert (await persist_once(Settings(database=database))).outcome == "applied"
    assert ("nodes", "aa11", 2, "") in read_rows(database)
    assert ("nodes", "aa11", 0, None) in read_rows(old)


async def test_a_row_that_moves_while_it_is_compared_is_found_again(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rowid belongs to somebody else by the time of the write; the key guards it."""
    original = Database.write
    moves = iter([True])

    async def write(opened: Database, step: steps.Write) -> steps.Written:
        if next(moves, False):
            with connect(database) as other:
                other.execute("UPDATE nodes SET rowid = rowid + 100 WHERE public_key = 'aa11'")
                other.execute("UPDATE nodes SET rowid = 1 WHERE public_key = 'ee55'")
        return await original(opened, step)

    monkeypatch.setattr(Database, "write", write)
    result = await apply(database, ("aa11", "confirmed", "advert"))

    assert (result.outcome, result.changed_active) == ("applied", 1)
    assert ("nodes", "aa11", 2, "advert") in read_rows(database)
    assert ("nodes", "ee55", 0, None) in read_rows(database)


# ------------------------------------------------------------------------------ preview


async def test_what_others_wrote_stays_in_their_wal(database: Path, tmp_path: Path) -> None:
    """A backup was copied over the open database: a checkpoint would ruin it."""
    backup = make_database(tmp_path / "backup.db", [("nodes", "aa11", 0, None)])
    with connect(database) as other:
        other.execute("PRAGMA wal_autocheckpoint = 0")
        other.execute("UPDATE nodes SET name = ?", ("x" * 1_500_000,))
        assert wal_size(database) > 4 << 20
        # Not in this process: closing the file would drop its locks.
        subprocess.run(["cp", backup, database], check=True)
        assert (await apply(database, ("aa11", "confirmed"))).outcome == "applied"
        assert database.read_bytes() == backup.read_bytes()


async def test_a_checkpoint_that_fails_takes_nothing_back(database: Path) -> None:
    """The disk takes the rows, in the WAL, and is full when they are to be moved over."""
    script = """
        import asyncio, resource, sys
        from mbcap_watch import Settings, persist_once
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, resource.RLIM_INFINITY))
        print(asyncio.run(persist_once(Settings(database=sys.argv[1]))).to_json(), flush=True)
    """
    late = [(f"{number:064x}",) for number in range(1_000)]
    put(document((late[-1][0], "confirmed")), snapshot_path(database))
    with connect(database) as other:
        other.execute("UPDATE nodes SET name = ?", ("x" * 5_000_000,))
        other.execute("BEGIN")
        other.executemany("INSERT INTO nodes (public_key) VALUES (?)", late)  # in pages after that
        other.execute("COMMIT")
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        assert wal_size(database) == 0
        before = database.stat().st_mtime_ns
        with other_process(script, str(database)) as process:
            result = msgspec.json.decode(read_line(process), type=PersistResult)
        assert (result.outcome, result.changed, result.error) == ("applied", 1, None)
        assert (wal_size(database) > 0, database.stat().st_mtime_ns) == (True, before)
        assert ("nodes", late[-1][0], 2, "") in read_rows(database)


async def test_no_file_is_left_beside_an_idle_database(database: Path) -> None:
    """It would belong to us, and could lock out an ingestor that runs as somebody else."""
    before = sorted(path.name for path in database.parent.iterdir())
    for entries in ([("aa11", "confirmed")], [("aa11", "confirmed")], [("zz", "confirmed")]):
        await apply(database, *entries)
        await preview_once(Settings(database))
        assert sorted(path.name for path in database.parent.iterdir()) == before


# ------------------------------------------------------------------------------ odd databases


@pytest.mark.parametrize(
    "failure",
    [
        "SELECT json('bad{')",
        "SELECT abs(-9223372036854775807 - 1)",
        "SELECT zeroblob(2000000000)",
        "INSERT INTO packets SELECT * FROM packets",
    ],
)
async def test_a_trigger_that_fails_in_any_way_stops_one_row(database: Path, failure: str) -> None:
    with connect(database) as connection:
        connection.execute("CREATE TABLE packets (id INTEGER PRIMARY KEY)")
        connection.execute("INSERT INTO packets VALUES (1)")
        connection.execute(
            "CREATE TRIGGER t BEFORE UPDATE ON nodes WHEN OLD.public_key = 'dd44'"
            f" BEGIN {failure}; END"
        )
    keys = ("aa11", "bb22", "cc33", "dd44", "ee55")
    result = await apply(database, *((key, "confirmed", "new") for key in keys))

    assert (result.outcome, result.failed_rows) == ("applied", 1)
    assert {row[1] for row in read_rows(database) if row[3] == "new"} == {*keys} - {"dd44"}


async def test_a_table_that_refuses_everything_does_not_stop_the_other(tmp_path: Path) -> None:
    database = make_database(
        tmp_path / "m.db",
        [("nodes", key, 0, None) for key in KEYS] + [("inactive_nodes", KEYS[0], 0, None)],
    )
    with connect(database) as connection:
        connection.execute(
            "CREATE TRIGGER t BEFORE UPDATE ON nodes BEGIN INSERT INTO nowhere VALUES (1); END"
        )
    result = await apply(database, *((key, "confirmed") for key in KEYS), batch_rows=7)

    assert (result.changed_active, result.changed_inactive) == (0, 1)
    assert result.failed_rows == ROWS


def test_the_times_of_a_database_that_is_busy_for_days() -> None:
    tally = Tally()
    for _ in range(2 * reconcile.MAX_TIMES):
        tally.waits.append(0.1)
        tally.holds.append(0.1)
    assert len(tally.waits) == len(tally.holds) == reconcile.MAX_TIMES


# ------------------------------------------------------------------------------ new rows


def played(
    work: steps.Steps, connection: sqlite3.Connection, written: steps.Written | None = None
) -> list[steps.Query | steps.Write]:
    """Run the steps that read; answer the others with `written`, or that all rows are."""
    seen = list[steps.Query | steps.Write]()
    answer: Any = None
    with contextlib.suppress(StopIteration):
        while True:
            seen.append(step := work.send(answer))
            if isinstance(step, steps.Write):
                answer = written or steps.Written(len(step.changes))
            else:
                answer = connection.execute(step.sql, step.parameters).fetchall()
                answer = Page(*zip(*answer, strict=True)) if step.is_page else answer
    return seen


def sizes(seen: list[steps.Query | steps.Write]) -> list[int]:
    return [len(step.changes) for step in seen if isinstance(step, steps.Write)]


@pytest.mark.parametrize("downgrade", ["allow", "never"])
@pytest.mark.parametrize(
    "known, largest, asked, found",
    [
        # The last row counts as new: its rowid may have been given to another node.
        ({NODES: 4}, {NODES: 8}, [4, 6, 8], {"d", "e"}),
        ({NODES: 2}, {NODES: 8}, [2, 4, 6, 8], {"b", "d", "e"}),
        ({NODES: 8}, {NODES: 8}, [8], set()),
        ({NODES: 8}, {NODES: 5}, [5], {"e"}),  # rows were deleted
        ({NODES: 9}, {NODES: 9}, [9], set()),  # also while it looks
        ({NODES: 4}, {INACTIVE: 1}, [], set()),
        ({NODES: 8, INACTIVE: 0}, {NODES: 8, INACTIVE: 1}, [0, 8], {"i"}),
    ],
)
def test_of_the_new_rows_those_that_differ_are_found(
    tmp_path: Path,
    known: dict[Table, int],
    largest: dict[Table, int],
    asked: list[int],
    found: set[str],
    downgrade: Downgrade,
) -> None:
    rows = [("nodes", key, 2 if key == "d" else 0, None) for key in "abcdefgh"]
    database = make_database(tmp_path / "m.db", [*rows, ("inactive_nodes", "i", 0, None)])
    wanted: dict[str, Value] = {"b": (2, ""), "d": (1, ""), "e": (2, "x"), "i": (2, "")}
    pages = reconcile.Pages(rows=2)
    work = reconcile.compare_new(wanted, known, Tally(largest=largest), downgrade, pages)
    with connect(database) as connection:
        seen = played(work, connection)
    assert sorted(each.parameters[0] for each in seen if isinstance(each, steps.Query)) == asked
    writes = [each for each in seen if isinstance(each, steps.Write)]
    assert all(each.downgrade == downgrade for each in writes)
    if downgrade == "never":
        found = found - {"d"}
    assert {change.public_key for each in writes for change in each.changes} == found


# ------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    "lengths, batches",
    [
        ([1] * 7, [5, 2]),  # `batch_rows`
        ([HALF] * 5, [2, 2, 1]),
        ([HALF - 1, HALF, 1, 1, HALF], [3, 2]),
        ([2 * HALF] * 2, [1, 1]),
        ([9 * HALF, 0, 0], [1, 2]),
    ],
)
async def test_a_batch_is_full_of_rows_or_of_text(
    tmp_path: Path, lengths: list[int], batches: list[int]
) -> None:
    wanted: dict[str, Value] = {f"k{n}": (2, "x" * size) for n, size in enumerate(lengths)}
    database = make_database(tmp_path / "m.db", [("nodes", key, 1, "old") for key in wanted])
    tally = Tally()
    work = reconcile.reconcile(database, wanted, tally, batch_rows=5, downgrade="allow")
    with connect(database) as connection:
        assert sizes(played(work, connection)) == batches
    assert tally.largest == {NODES: len(wanted), INACTIVE: 0}
    assert (tally.changed.total(), tally.revalued, tally.failed) == (len(wanted), len(wanted), {})


async def test_once_many_rows_are_refused_a_batch_is_given_up_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "MAX_HALVED", 2)
    wanted: dict[str, Value] = {f"k{n}": (2, "") for n in range(9)}
    database = make_database(tmp_path / "m.db", [("nodes", key, 0, None) for key in wanted])
    tally, refusal = Tally(), sqlite3.IntegrityError("not this one")
    refusal.sqlite_errorcode = sqlite3.SQLITE_CONSTRAINT
    work = reconcile.reconcile(database, wanted, tally, batch_rows=5, downgrade="allow")
    with connect(database) as connection:
        seen = played(work, connection, steps.Written(0, refusal))
    assert sizes(seen) == [5, 2, 1, 1, 3, 4]
    assert tally.failed == {("nodes", key): "not this one" for key in wanted}


# ------------------------------------------------------------------------------ which way to read


@pytest.mark.parametrize(
    "rows, bounds",
    [
        (8, [(-math.inf, 3), (3, 6), (6, math.inf)]),  # four rows for each key
        (9, [("k0", "k1")]),
        (6, [(-math.inf, 3), (3, math.inf)]),
    ],
)
async def test_a_table_is_read_in_pages_unless_it_is_far_larger_than_the_snapshot(
    tmp_path: Path, rows: int, bounds: list[tuple[Any, ...]]
) -> None:
    database = make_database(tmp_path / "m.db", [("nodes", f"k{n}", 0, None) for n in range(rows)])
    wanted: dict[str, Value] = {"k0": (2, ""), "k1": (2, "")}
    work = reconcile.reconcile(
        database, wanted, Tally(), batch_rows=5, downgrade="allow", pages=reconcile.Pages(rows=3)
    )
    with connect(database) as connection:
        seen = played(work, connection)
    assert [step.parameters for step in seen if isinstance(step, steps.Query) if step.is_page] == (
        bounds
    )
    assert sizes(seen) == [2]


async def test_a_table_without_rowids_is_asked_for_keys(tmp_path: Path) -> None:
    database = make_database(tmp_path / "m.db", [("inactive_nodes", "k0", 0, None)])
    with connect(database) as connection:
        connection.execute("DROP TABLE nodes")
        connection.execute(
            "CREATE TABLE nodes (public_key TEXT PRIMARY KEY, multibyte_sup INTEGER,"
            " multibyte_evidence TEXT) WITHOUT ROWID"
        )
        connection.execute("INSERT INTO nodes VALUES ('k0', 0, NULL)")
        tally = Tally()
        work = reconcile.reconcile(
            database, {"k0": (2, "")}, tally, batch_rows=5, downgrade="allow"
        )
        seen = played(work, connection)
    asked = [step.parameters for step in seen if isinstance(step, steps.Query) if step.is_page]
    assert asked == [("k0",), (-math.inf, math.inf)]
    assert (sizes(seen), tally.largest) == ([1, 1], {INACTIVE: 1})
