"""Upstream is not steady: what `downgrade = "hold"` makes of it, and nodes that return."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import aiosqlite
import anyio
import pytest

from mbcap_watch import Settings, apply_snapshot, persist_once, read_snapshot, snapshot_path
from mbcap_watch.bridge import spot, sync
from mbcap_watch.store import reader
from support import (
    DEADLINE,
    Results,
    bridge,
    connect,
    document,
    locked,
    make_database,
    put,
    read_rows,
    rename_from_another_process,
    until,
)

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

KEYS = [f"{number:064x}" for number in range(300)]
GOOD = document(*((key, "confirmed", "advert") for key in KEYS))
# After a restart of the server with a hot start; and of a request with an area filter.
ALL_SUSPECTED = document(*((key, "suspected", "path") for key in KEYS))
FILTERED = document(*((key, "suspected", "path") for key in KEYS[::3]))


@pytest.fixture
def mesh(tmp_path: Path) -> Path:
    """300 confirmed nodes, every tenth of them stale as well."""
    rows = [("nodes", key, 2, "advert") for key in KEYS]
    stale = [("inactive_nodes", key, 2, "advert") for key in KEYS[::10]]
    database = make_database(tmp_path / "meshcore.db", [*rows, *stale])
    put(GOOD, snapshot_path(database))
    return database


def version(connection: sqlite3.Connection) -> int:
    """Return what another connection's commit changes."""
    [(number,)] = connection.execute("PRAGMA data_version").fetchall()
    return int(number)


async def publish(results: Results, data: bytes, database: Path) -> None:
    known = len(results.all)
    rename_from_another_process(data, snapshot_path(database))
    await until(lambda: len(results.all) > known, "a result")


# ------------------------------------------------------------------------------ hold


@pytest.mark.parametrize(
    "wrong, rows", [(ALL_SUSPECTED, 330), (FILTERED, 110)], ids=["restart", "filtered"]
)
async def test_a_wrong_snapshot_that_is_taken_back(mesh: Path, wrong: bytes, rows: int) -> None:
    before = read_rows(mesh)
    with connect(mesh) as watcher:
        async with bridge(mesh, debounce=0) as results:  # "allow"
            at_first = version(watcher)
            await publish(results, wrong, mesh)
            assert version(watcher) != at_first
            await publish(results, GOOD, mesh)
            assert [result.changed for result in results.all] == [0, rows, rows]
        async with bridge(mesh, debounce=0, downgrade="hold") as results:
            at_first = version(watcher)
            for _ in range(2):
                await publish(results, wrong, mesh)
                await publish(results, GOOD, mesh)
            assert version(watcher) == at_first
    held = len(KEYS) if wrong is ALL_SUSPECTED else len(KEYS[::3])
    assert [result.held for result in results.all] == [0, held, 0, held, 0]
    assert {result.outcome for result in results.all} == {"unchanged"}
    assert read_rows(mesh) == before


async def test_a_real_downgrade_is_written_when_it_is_due(mesh: Path) -> None:
    """Nothing but the due time makes the bridge sync: every clock is off."""
    async with bridge(mesh, debounce=0, downgrade="hold", downgrade_hold="500ms") as results:
        published = time.monotonic()
        await publish(results, ALL_SUSPECTED, mesh)
        assert (results.all[1].outcome, results.all[1].held) == ("unchanged", 300)
        await results.next("applied")
        assert time.monotonic() - published >= 0.5
        *_, last = results.all
    assert (last.reason, last.changed, last.held, last.set_back) == ("retry", 330, 0, 0)
    assert {row[2:] for row in read_rows(mesh)} == {(1, "path")}


async def test_raising_is_never_delayed(mesh: Path) -> None:
    with connect(mesh) as connection:
        connection.execute("UPDATE nodes SET multibyte_sup = 1 WHERE public_key = ?", KEYS[:1])
        connection.execute("INSERT INTO nodes (public_key) VALUES ('new')")
    wishes = [(key, "suspected", "path") for key in [*KEYS[1:], "new"]]
    async with bridge(mesh, debounce=0, downgrade="hold") as results:
        await publish(results, document((KEYS[0], "confirmed", "later"), *wishes), mesh)
    first, last = results.all
    assert (first.changed, first.held) == (1, 0)  # as GOOD says
    assert (last.changed_active, last.changed_inactive, last.held) == (2, 1, 299)
    assert ("nodes", "new", 1, "path") in read_rows(mesh)


async def test_a_restart_starts_the_wait_anew(mesh: Path) -> None:
    put(ALL_SUSPECTED, snapshot_path(mesh))
    settings = {"downgrade": "hold", "downgrade_hold": "700ms"}
    async with bridge(mesh, **settings) as results:
        assert results.all[0].held == 300
    await anyio.sleep(0.7)
    async with bridge(mesh, **settings) as results:
        assert (results.all[0].outcome, results.all[0].held) == ("unchanged", 300)
        assert (await results.next("applied")).changed == 330


async def test_what_is_malformed_or_gone_meanwhile_says_nothing(mesh: Path) -> None:
    settings: dict[str, Any] = {"downgrade": "hold", "downgrade_hold": "2s", "debounce": 0}
    async with bridge(mesh, **settings) as results:
        await publish(results, ALL_SUSPECTED, mesh)
        await publish(results, b"{", mesh)
        await results.next("malformed")
        snapshot_path(mesh).unlink()
        await results.next("no_snapshot")
        await anyio.sleep(2.1)
        assert {row[2] for row in read_rows(mesh)} == {2}
        await publish(results, ALL_SUSPECTED, mesh)
        assert results.all[-1].changed == 330


async def test_a_due_downgrade_that_is_refused_is_reported_and_tried_later(mesh: Path) -> None:
    with connect(mesh) as connection:
        connection.execute(
            "CREATE TRIGGER no BEFORE UPDATE ON nodes BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
        settings: dict[str, Any] = {"downgrade": "hold", "downgrade_hold": "200ms", "debounce": 0}
        async with bridge(mesh, **settings) as results:
            await publish(results, ALL_SUSPECTED, mesh)
            result = await results.next("applied")
            assert (result.failed_rows, result.changed_inactive, result.held) == (300, 30, 0)
            result = await results.sync()
            assert (result.failed_rows, result.outcome) == (300, "failed")
            connection.execute("DROP TRIGGER no")
            result = await results.sync()
            assert (result.changed_active, result.set_back, result.held) == (300, 0, 0)
            assert len(results.all) == 5


async def test_a_single_call_lowers_nothing(mesh: Path) -> None:
    put(ALL_SUSPECTED, snapshot_path(mesh))
    settings = Settings(mesh, downgrade="hold", downgrade_hold="100ms")
    once = await persist_once(settings)
    async with aiosqlite.connect(mesh) as connection:
        snapshot = read_snapshot(mesh.parent / "mbcap-snapshot")
        lock = anyio.Lock()
        hosts = await apply_snapshot(connection, snapshot, lock=lock, downgrade="hold")
    for result in (once, hosts):
        assert (result.outcome, result.changed, result.held) == ("unchanged", 0, 300)


# ------------------------------------------------------------------------------ nodes that return


@pytest.fixture
def hardly_any_spot_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds a small mesh's returning node as well, if that is among its keys."""
    monkeypatch.setattr(spot, "KEYS", 1)


@pytest.mark.usefixtures("hardly_any_spot_check")
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "large snapshot"])
@pytest.mark.parametrize("table", ["nodes", "inactive_nodes"])
@pytest.mark.parametrize(
    "removed, returns",
    [(KEYS[7], KEYS[7]), (KEYS[299], KEYS[299]), ("", "new")],
    ids=["an old row", "the last row", "never there"],
)
async def test_a_node_that_returns_has_its_value_after_a_sweep(
    mesh: Path, monkeypatch: pytest.MonkeyPatch, kept: bool, table: str, removed: str, returns: str
) -> None:
    if not kept:
        monkeypatch.setattr(sync, "KEPT_BYTES", 0)
        if returns == KEYS[299]:
            pytest.skip("its rowid is not larger; it has to wait for the resync")
    put(document(*((key, "confirmed", "advert") for key in [*KEYS, "new"])), snapshot_path(mesh))
    with connect(mesh) as connection:
        connection.execute("INSERT OR IGNORE INTO inactive_nodes SELECT * FROM nodes")
        async with bridge(mesh, sweep_interval="50ms") as results:
            connection.execute("BEGIN")
            connection.execute(f"DELETE FROM {table} WHERE public_key = ?", (removed,))
            connection.execute(f"INSERT INTO {table} (public_key) VALUES (?)", (returns,))
            connection.execute("COMMIT")
            result = await results.next("applied")
            assert (result.reason, result.changed, result.set_back) == ("sweep", 1, 0)
            assert (table, returns, 2, "advert") in read_rows(mesh)
            # Its own write is looked at as well, and is no news.
            await results.syncs(3)
            assert results.outcomes == ["unchanged", "applied"]


async def test_a_look_at_new_rows_takes_no_lock_and_is_no_sync(mesh: Path) -> None:
    put(FILTERED, snapshot_path(mesh))  # every downgrade waits
    async with bridge(mesh, sweep_interval="50ms", downgrade="hold") as results:
        for number in range(3):
            with connect(mesh) as connection:
                connection.execute("INSERT INTO nodes (public_key) VALUES (?)", (f"{number}",))
                back = "INSERT INTO nodes SELECT * FROM inactive_nodes WHERE public_key = ?"
                connection.execute("DELETE FROM nodes WHERE public_key = ?", KEYS[:1])
                connection.execute(back, KEYS[:1])  # with its value
            with locked(mesh) as release:
                await results.syncs(3)
                release()
        assert results.outcomes == ["unchanged"]
        assert results.all[0].held == 100


async def test_what_nobody_wrote_is_not_looked_at(
    mesh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To root, a look changes the -wal: SQLite gives it to the owner of the database anew."""
    looks: list[Any] = []

    def count(*args: Any) -> Any:
        looks.append(args)
        return reader.open_to_read(*args)

    monkeypatch.setattr(sync, "open_to_read", count)
    with connect(mesh) as connection:
        connection.execute("INSERT INTO nodes (public_key) VALUES ('first')")
        async with bridge(mesh, sweep_interval="20ms") as results:
            for number in range(2):
                known = len(looks)
                connection.execute("INSERT INTO inactive_nodes (public_key) VALUES (?)", (number,))
                # Again while it is fresh: a commit changes the files before it can be read.
                await until(lambda n=known: len(looks) >= n + 2, "looks")  # type: ignore[misc]
                known = -1
                with anyio.fail_after(DEADLINE):
                    while known != len(looks):
                        known = len(looks)
                        await results.syncs(5)
            assert results.outcomes == ["unchanged"]


@pytest.mark.usefixtures("hardly_any_spot_check")
async def test_a_new_row_that_is_refused_is_not_tried_at_every_sweep(mesh: Path) -> None:
    with connect(mesh) as connection:
        connection.execute("DELETE FROM nodes WHERE public_key = ?", KEYS[:1])
        connection.execute(
            "CREATE TRIGGER no BEFORE UPDATE ON nodes BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
        async with bridge(mesh, sweep_interval="50ms") as results:
            connection.execute("INSERT INTO nodes (public_key) VALUES (?)", KEYS[:1])
            assert (await results.next("failed")).failed_rows == 1
            for number in range(10):
                connection.execute("INSERT INTO inactive_nodes (public_key) VALUES (?)", (number,))
                await results.syncs(1)
    assert [result.reason for result in results.all].count("sweep") == 1


async def test_without_rowids_a_node_waits_for_the_resync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "meshcore.db"
    with connect(database) as connection:
        connection.execute("PRAGMA journal_mode = wal")
        for table in ("nodes", "inactive_nodes"):
            connection.execute(
                f"CREATE TABLE {table} (public_key TEXT PRIMARY KEY, multibyte_sup INTEGER NOT NULL"
                " DEFAULT 0, multibyte_evidence TEXT) WITHOUT ROWID"
            )
        connection.execute("INSERT INTO nodes VALUES ('aa', 2, 'advert')")
        put(document(("aa", "confirmed", "advert"), ("bb", "suspected")), snapshot_path(database))
        monkeypatch.setattr(spot, "KEYS", 0)
        async with bridge(database, sweep_interval="20ms", resync="500ms") as results:
            connection.execute("INSERT INTO nodes (public_key) VALUES ('bb')")
            result = await results.next("applied")
    assert (result.reason, result.changed) == ("resync", 1)
