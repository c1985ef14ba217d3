"""States of the database to wait in: each is named, tried again, and heals without a restart."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from functools import partial
from typing import TYPE_CHECKING

import pytest

from machine import mounted, without_rights
from mbcap_watch import snapshot_path
from processes import call_json
from support import (
    bridge,
    connect,
    document,
    landed,
    locked,
    make_database,
    open_descriptors,
    other_process,
    put,
    read_line,
    read_rows,
    until,
    wait_until,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

SWEEP = {"sweep_interval": "50ms", "poll_interval": "20ms"}
VALUE = ("nodes", "aa11", 2, "new")
SNAPSHOT = document(("aa11", "confirmed", "new"))


# ------------------------------------------------------------------------------ the file


async def test_a_corrupt_database_is_replaced_by_a_good_one(database: Path) -> None:
    good = database.with_name("good.db")
    shutil.copy(database, good)
    database.write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    put(SNAPSHOT, snapshot_path(database))
    async with bridge(database, **SWEEP) as results:
        await results.next("failed")
        os.replace(good, database)
        await landed(database, "new")


async def test_a_database_that_is_replaced_is_compared_at_the_next_sweep(database: Path) -> None:
    """Also when `stat` alone tells that the snapshot is the known one."""
    backup = database.with_name("backup.db")
    shutil.copy(database, backup)
    put(SNAPSHOT, snapshot_path(database))
    async with bridge(database, **SWEEP) as results:
        await landed(database, "new")
        trusted = snapshot_path(database).stat().st_ctime + 1
        await until(lambda: (results.state.last_sync or 0) > trusted)
        await results.syncs(2)  # which do not read the snapshot
        gone = database.with_name("gone.db")
        os.replace(database, gone)
        await results.next("database_missing")
        os.replace(backup, database)
        await results.count("applied", 2)
    assert set(results.outcomes) == {"applied", "database_missing"}
    assert {result.entries for result in results.all} == {1}
    assert results.state.sweep_hits == 0, "the watch missed nothing"


async def test_the_database_goes_and_comes_back(database: Path) -> None:
    put(SNAPSHOT, snapshot_path(database))
    async with bridge(database, **SWEEP) as results:
        await landed(database, "new")
        gone = database.with_name("gone.db")
        os.replace(database, gone)
        await results.next("database_missing")
        with connect(gone) as connection:
            connection.execute("UPDATE nodes SET multibyte_sup = 0")
        os.replace(gone, database)
        await landed(database, "new")


# ------------------------------------------------------------------------------ the filesystem


def small_disk(directory: Path) -> contextlib.AbstractContextManager[None]:
    return mounted(directory, "-t", "tmpfs", "-o", "size=512k", "none")


def fill(filler: Path) -> None:
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


READER = """
    import sqlite3, sys
    connection = sqlite3.connect(sys.argv[1])
    connection.execute("SELECT * FROM nodes").fetchall()
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.system
async def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk):
        database = make_database(disk / "m.db", [("nodes", "aa11", 0, None)])
        filler = disk / "filler"
        async with bridge(database, snapshot_dir=tmp_path / "snapshots", **SWEEP) as results:
            # Another process keeps the WAL and its index in place, as the ingestor does.
            with other_process(READER, str(database)) as reader:
                assert read_line(reader) == "ready"
                fill(filler)
                put(SNAPSHOT, tmp_path / "snapshots" / "snapshot.json")
                failed = await results.next("failed")
                assert "disk is full" in str(failed.error)
                assert failed.cause == "disk_full"
                await results.count("failed", 3)
                filler.unlink()
                await landed(database, "new")


@pytest.mark.system
async def test_a_disk_too_full_for_the_index_of_the_wal(tmp_path: Path) -> None:
    """SQLite calls that an I/O error (SQLITE_IOERR_SHMSIZE)."""
    disk = tmp_path / "disk"
    with small_disk(disk):
        database = make_database(disk / "m.db", [("nodes", "aa11", 0, None)])
        filler = disk / "filler"
        fill(filler)
        put(SNAPSHOT, tmp_path / "snapshots" / "snapshot.json")
        async with bridge(database, snapshot_dir=tmp_path / "snapshots", **SWEEP) as results:
            failed = await results.next("failed")
            assert "disk is full" in str(failed.error)
            assert failed.cause == "disk_full"
            filler.unlink()
            await landed(database, "new")


@pytest.mark.system
async def test_a_read_only_filesystem(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk):
        database = make_database(disk / "m.db", [("nodes", "aa11", 0, None)])
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        async with bridge(database, snapshot_dir=tmp_path / "snapshots", **SWEEP) as results:
            put(SNAPSHOT, tmp_path / "snapshots" / "snapshot.json")
            failed = await results.next("failed")
            assert "mounted read-only" in str(failed.error)
            assert failed.cause == "read_only"
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            await landed(database, "new")


@pytest.mark.system
async def test_no_permission_on_the_wal(database: Path) -> None:
    apply = partial(call_json, "apply", "--database", database, prefix=without_rights())
    put(SNAPSHOT, snapshot_path(database))
    with connect(database) as other:
        other.execute("SELECT * FROM nodes").fetchall()
        for name in ("-wal", "-shm"):
            path = database.with_name(database.name + name)
            path.chmod(0)
            code, result = apply()
            assert (code, f"may not write {path} (user" in result["error"]) == (1, True), result
            path.chmod(0o644)
        code, result = apply()
        assert (code, result["outcome"]) == (0, "applied"), result


# ------------------------------------------------------------------------------ the neighbours


async def test_an_idle_bridge_is_in_nobodys_way(database: Path) -> None:
    """No handle, no transaction: others checkpoint, and even take the database for themselves."""
    put(SNAPSHOT, snapshot_path(database))
    async with bridge(database, mode="inotify"):
        assert not any(path.startswith(str(database)) for path in open_descriptors().values())
        with connect(database, timeout=0) as other:
            other.execute("UPDATE nodes SET name = 'x'")
            assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
            other.execute("BEGIN EXCLUSIVE")
            other.execute("COMMIT")


async def test_a_poll_that_is_quicker_than_the_pause_does_not_push_the_retry_away(
    database: Path,
) -> None:
    async with bridge(database, mode="poll", poll_interval="10ms") as results:
        with locked(database) as release:
            put(SNAPSHOT, snapshot_path(database))
            await results.syncs(60)
            release()
        await landed(database, "new")


# ------------------------------------------------------------------------------ retries alone


async def test_a_refused_row_is_tried_again_long_before_the_resync(database: Path) -> None:
    """Also when nothing else differs, and without any change of the file."""
    with connect(database) as connection:
        connection.execute(
            "CREATE TRIGGER t BEFORE UPDATE ON nodes BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
        put(SNAPSHOT, snapshot_path(database))
        async with bridge(database, sweep_interval="50ms") as results:
            assert results.outcomes == ["failed"]
            connection.execute("DROP TRIGGER t")
            assert (await results.next("applied")).reason == "retry"
            assert VALUE in read_rows(database)


async def test_columns_that_come_one_table_after_the_other(database: Path) -> None:
    with connect(database) as connection:
        connection.execute("ALTER TABLE inactive_nodes DROP COLUMN multibyte_sup")
        put(document(("aa11", "confirmed"), ("bb22", "confirmed")), snapshot_path(database))
        async with bridge(database, sweep_interval="50ms") as results:
            assert [(r.outcome, r.changed) for r in results.all] == [("applied", 1)]
            connection.execute(
                "ALTER TABLE inactive_nodes ADD COLUMN multibyte_sup INTEGER NOT NULL DEFAULT 0"
            )
            await results.count("applied", 2)
            assert ("inactive_nodes", "bb22", 2, "") in read_rows(database)


async def test_large_evidence_makes_smaller_batches(tmp_path: Path) -> None:
    keys = [f"{number:04}" for number in range(600)]
    database = make_database(tmp_path / "m.db", [("nodes", key, 0, None) for key in keys])
    put(document(*((key, "confirmed", "x" * 4_000) for key in keys)), snapshot_path(database))
    async with bridge(database) as results:
        assert len(results.timings[0].holds) == 10  # 66 rows are over a quarter of a megabyte


@pytest.mark.system
@pytest.mark.parametrize("spare", range(1, 8))
def test_a_running_daemon_is_short_of_descriptors(tmp_path: Path, spare: int) -> None:
    """It waits, and goes on when there are some again."""
    database = make_database(tmp_path / "m.db", [("nodes", "aa11", 0, None)])
    script = """if True:
        import asyncio, os, resource, sys
        from mbcap_watch import Settings, run
        def seen(result):
            print(result.outcome, flush=True)
        async def main():
            task = asyncio.create_task(run(
                Settings(sys.argv[1], poll_interval=0.02, sweep_interval=0.05), on_result=seen))
            loop = asyncio.get_running_loop()
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                limit = hard
                if int(line):
                    limit = max(map(int, os.listdir("/proc/self/fd"))) + int(line)
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                print("limit", flush=True)
            assert not task.done(), task
        asyncio.run(main())
    """
    with other_process(script, str(database)) as process:
        assert process.stdin is not None
        assert read_line(process) == "no_snapshot"
        for limit in (spare, 0):
            process.stdin.write(f"{limit}\n")
            process.stdin.flush()
            lines = iter(lambda: read_line(process), "limit")
            assert "" not in lines
            if limit:
                put(SNAPSHOT, snapshot_path(database))
        wait_until(lambda: VALUE in read_rows(database))
        assert process.poll() is None
