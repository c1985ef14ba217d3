"""Closing any descriptor of a file drops all locks that the process holds on it (fcntl(2)).

Those of a host's connection, and those of other bridges, stay all the same.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import aiosqlite
import pytest
from anyio import to_thread

from mbcap_watch import snapshot_path
from mbcap_watch.store.native import Connection
from processes import neighbour, running
from restores import BACKUP_PACKETS, KEYS, judge, remove_wal, snapshot
from support import (
    Results,
    bridge,
    connect,
    document,
    holders,
    other_process,
    put,
    read_line,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def hosts_connection(database: Path) -> AsyncIterator[aiosqlite.Connection]:
    async with aiosqlite.connect(database, isolation_level=None) as connection:
        await connection.execute_fetchall("SELECT count(*) FROM packets")
        yield connection


async def syncs(results: Results, count: int = 4) -> None:
    known = len(results.all)
    await until(lambda: len(results.all) >= known + count, f"{count} syncs")


async def test_the_locks_of_the_hosts_connection_are_never_dropped(meshcore: Path) -> None:
    """Closing any descriptor of a file drops all of a process's locks of it (fcntl(2))."""
    mine = (os.getpid(), os.getpid())
    with holders() as ask:
        async with hosts_connection(meshcore) as connection:
            assert ask(meshcore) == mine
            async with bridge(meshcore, sweep_interval="50ms", resync="100ms") as results:
                await results.next("applied")
                assert ask(meshcore) == mine
                await syncs(results)
                assert ask(meshcore) == mine
                await connection.execute("UPDATE nodes SET multibyte_sup = 0")  # fills the -wal
                await syncs(results)
                assert ask(meshcore) == mine
                with running(neighbour("ingestor", meshcore, "live")):
                    await syncs(results)
                    assert ask(meshcore) == mine
                await syncs(results)
                assert ask(meshcore) == mine
            assert ask(meshcore) == mine


async def test_the_hosts_write_lock_is_never_dropped(meshcore: Path) -> None:
    async with (
        hosts_connection(meshcore) as connection,
        bridge(meshcore, sweep_interval="50ms", resync="100ms", busy_deadline=0) as results,
    ):
        await results.next("applied")
        await connection.execute("BEGIN IMMEDIATE")
        await connection.execute("UPDATE nodes SET multibyte_sup = 0")
        put(snapshot("second"), snapshot_path(meshcore))
        await results.next("busy")
        await syncs(results)
        script = """
            import sqlite3, sys
            try:
                sqlite3.connect(sys.argv[1], timeout=0).execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                print(error.sqlite_errorname)
        """
        with other_process(script, str(meshcore)) as process:
            assert read_line(process) == "SQLITE_BUSY"
        await connection.execute("COMMIT")
        await results.next("applied", after=len(results.all))
    assert judge(meshcore, 0, 0).values == {(2, "second")}


async def test_the_hosts_locks_stay_when_its_file_was_replaced(
    meshcore: Path, backup: Path
) -> None:
    mine = (os.getpid(), os.getpid())
    old = meshcore.with_name("old.db")
    os.link(meshcore, old)
    Path(f"{old}-shm").symlink_to(f"{meshcore}-shm")
    with holders() as ask:
        async with hosts_connection(meshcore) as connection:
            await connection.execute("INSERT INTO packets (generation) VALUES ('live')")
            os.replace(backup, meshcore)
            async with bridge(meshcore, sweep_interval="50ms", resync="100ms") as results:
                await results.next("foreign_wal")
                await syncs(results)
                assert ask(old) == mine
                assert ask(meshcore)[0] == 0
            rows = await connection.execute_fetchall("SELECT count(*) FROM packets")
            assert list(rows) == [(301,)]
    judged = judge(meshcore, BACKUP_PACKETS["smaller"], 0)
    assert judged.values in ({(0, None)}, set()), "nothing of ours is in it"


async def test_the_hosts_locks_stay_when_its_file_is_replaced_during_a_sync(
    meshcore: Path, backup: Path
) -> None:
    """To open the new file at the end would empty the -shm, which the host uses."""
    with holders() as ask:
        async with hosts_connection(meshcore) as connection:
            await connection.execute("INSERT INTO packets (generation) VALUES ('live')")
            ours = Connection(meshcore, 60.0, owes_checkpoint=False)
            os.replace(backup, meshcore)
            ours.close()
            assert ask(meshcore) == (0, os.getpid())


async def test_nothing_is_written_through_files_that_were_removed_under_the_host(
    meshcore: Path,
) -> None:
    """Others have new ones: two that do not see each other's locks would write to one file."""
    async with hosts_connection(meshcore):
        remove_wal(meshcore)
        with running(neighbour("ingestor", meshcore, "live")):
            async with bridge(meshcore, sweep_interval="50ms") as results:
                assert results.outcomes[0] == "foreign_wal"


# A statement that takes long enough for the others to do their worst.
_SLOW = """
    CREATE TRIGGER slow AFTER UPDATE ON nodes BEGIN
        INSERT INTO slow WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n LIMIT
        2000000) SELECT max(i) FROM n;
    END
"""


async def test_two_bridges_in_one_process_keep_each_others_locks(meshcore: Path) -> None:
    """While one writes, the other comes and goes; who gets the lock then finds the write done."""
    with connect(meshcore) as connection:
        connection.execute("CREATE TABLE slow (i)")
        connection.execute(_SLOW)
    script = """
        import sqlite3, sys, time
        connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=0)
        def begin():
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
            return True
        print("watching", flush=True)
        while begin():
            connection.execute("ROLLBACK")
            time.sleep(0.001)
        print("locked", flush=True)
        while not begin():
            time.sleep(0.001)
        [(count,)] = connection.execute("SELECT count(*) FROM slow")
        print(count, flush=True)
    """
    other = meshcore.with_name("other") / "mbcap-snapshot"
    other.mkdir(parents=True)
    put(document(("absent", "confirmed")), other / "snapshot.json")
    snapshot_path(meshcore).unlink()
    with running(neighbour("idler", meshcore)):
        async with (
            bridge(meshcore) as writing,
            bridge(meshcore, snapshot_dir=other, resync="100ms", sweep_interval="50ms") as reading,
        ):
            with other_process(script, str(meshcore)) as process:
                assert read_line(process) == "watching"
                put(document((KEYS[0], "confirmed")), snapshot_path(meshcore))
                # In a thread: the bridges need the loop.
                assert await to_thread.run_sync(read_line, process) == "locked"
                known = len(reading.all)
                assert await to_thread.run_sync(read_line, process) == "1"
                await writing.next("applied")
                await until(lambda: len(reading.all) > known, "a sync of the other")
            assert not {"failed", "foreign_wal"} & {*writing.outcomes, *reading.outcomes}
