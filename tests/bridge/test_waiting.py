"""States of the database to wait in: each is named, tried again, and heals without a restart."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import anyio
import pytest

from mbcap_watch import (
    Settings,
    WatchState,
    ensure_snapshot_dir,
    persist_once,
    snapshot_path,
)
from mbcap_watch.bridge import service
from mbcap_watch.watcher import inotify
from processes import daemon
from support import (
    bridge,
    connect,
    document,
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
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

ROOT = os.geteuid() == 0
SWEEP = {"sweep_interval": "50ms", "poll_interval": "20ms"}
VALUE = ("nodes", "aa11", 2, "new")
SNAPSHOT = document(("aa11", "confirmed", "new"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def landed(database: Path) -> None:
    await until(lambda: VALUE in read_rows(database))


# ------------------------------------------------------------------------------ the file


async def test_a_corrupt_database_is_replaced_by_a_good_one(database: Path) -> None:
    good = database.with_name("good.db")
    shutil.copy(database, good)
    database.write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    put(SNAPSHOT, snapshot_path(database))
    async with bridge(database, **SWEEP) as results:
        await results.next("failed")
        os.replace(good, database)
        await landed(database)


async def test_a_backup_moved_into_place_gets_its_values_at_the_next_sweep(database: Path) -> None:
    """Without a new snapshot, and long before the resync: another file is another state."""
    backup = database.with_name("backup.db")
    shutil.copy(database, backup)
    put(SNAPSHOT, snapshot_path(database))
    async with bridge(database, **SWEEP) as results:
        await landed(database)
        os.replace(backup, database)
        await results.count("applied", 2)
        assert VALUE in read_rows(database)
        assert results.state.sweep_hits == 0, "the watch missed nothing"


async def test_a_database_that_is_replaced_is_compared_at_the_next_sweep(database: Path) -> None:
    """Also when `stat` alone tells that the snapshot is the known one."""
    backup = database.with_name("backup.db")
    shutil.copy(database, backup)
    put(SNAPSHOT, snapshot_path(database))
    async with bridge(database, **SWEEP) as results:
        await landed(database)
        trusted = snapshot_path(database).stat().st_ctime + 1
        await until(lambda: (results.state.last_sync or 0) > trusted)
        known = len(results.states)
        await until(lambda: len(results.states) > known + 2, "sweeps that do not read the snapshot")
        gone = database.with_name("gone.db")
        os.replace(database, gone)
        await results.next("database_missing")
        os.replace(backup, database)
        await results.count("applied", 2)
    assert set(results.outcomes) == {"applied", "database_missing"}
    assert {result.entries for result in results.all} == {1}


async def test_a_backup_copied_over_the_file_gets_its_values_at_the_resync(database: Path) -> None:
    backup = database.with_name("backup.db")
    shutil.copy(database, backup)
    put(SNAPSHOT, snapshot_path(database))
    async with bridge(database, resync="200ms") as results:
        await landed(database)
        shutil.copyfile(backup, database)
        await results.count("applied", 2)
        assert VALUE in read_rows(database)


async def test_the_database_goes_and_comes_back(database: Path) -> None:
    put(SNAPSHOT, snapshot_path(database))
    async with bridge(database, **SWEEP) as results:
        await landed(database)
        gone = database.with_name("gone.db")
        os.replace(database, gone)
        await results.next("database_missing")
        with connect(gone) as connection:
            connection.execute("UPDATE nodes SET multibyte_sup = 0")
        os.replace(gone, database)
        await landed(database)


# ------------------------------------------------------------------------------ the filesystem


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    directory.mkdir()
    if not ROOT:
        pytest.skip("needs root to mount")
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(directory)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


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
                with contextlib.suppress(OSError), open(filler, "wb") as file:
                    while True:
                        file.write(b"x" * 4096)
                        file.flush()
                put(SNAPSHOT, tmp_path / "snapshots" / "snapshot.json")
                failed = await results.next("failed")
                assert "disk is full" in str(failed.error)
                assert failed.cause == "disk_full"
                await results.count("failed", 3)
                filler.unlink()
                await landed(database)


@pytest.mark.system
async def test_a_disk_too_full_for_the_index_of_the_wal(tmp_path: Path) -> None:
    """SQLite calls that an I/O error (SQLITE_IOERR_SHMSIZE)."""
    disk = tmp_path / "disk"
    with small_disk(disk):
        database = make_database(disk / "m.db", [("nodes", "aa11", 0, None)])
        filler = disk / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        put(SNAPSHOT, tmp_path / "snapshots" / "snapshot.json")
        async with bridge(database, snapshot_dir=tmp_path / "snapshots", **SWEEP) as results:
            failed = await results.next("failed")
            assert "disk is full" in str(failed.error)
            assert failed.cause == "disk_full"
            filler.unlink()
            await landed(database)


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
            await landed(database)


@pytest.mark.system
async def test_no_permission_on_the_wal(database: Path) -> None:
    without_rights: list[str] = []
    if ROOT:
        without_rights = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
        without_rights += ["--inh-caps=-all", "--"]
        if subprocess.run([*without_rights, "true"], check=False, capture_output=True).returncode:
            pytest.skip("cannot drop capabilities here")
    command = [*without_rights, sys.executable, "-m", "mbcap_watch", "apply", "--json"]
    command += ["--database", str(database)]
    put(SNAPSHOT, snapshot_path(database))
    with connect(database) as other:
        other.execute("SELECT * FROM nodes").fetchall()
        for name in ("-wal", "-shm"):
            path = database.with_name(database.name + name)
            path.chmod(0)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 1, done
            assert f"may not write {path} (user" in done.stdout
            path.chmod(0o644)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, '"outcome":"applied"' in done.stdout) == (0, True), done


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


GREEDY = """
    import sqlite3, sys, time
    connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
    print("ready", flush=True)
    for number in range(8):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE nodes SET name = ?", (number,))
        time.sleep(0.4)  # how long it holds the lock
        connection.execute("COMMIT")
        time.sleep(0.02)  # and lets it go
    connection.close()
    print("done", flush=True)
"""


async def test_a_neighbour_that_hardly_lets_go(tmp_path: Path) -> None:
    """It holds the lock for 95 % of the time; all rows get through, and it is never refused."""
    keys = [f"{number:064x}" for number in range(3000)]
    database = make_database(tmp_path / "m.db", [("nodes", key, 0, None) for key in keys])
    put(document(*((key, "confirmed", "new") for key in keys)), snapshot_path(database))
    with other_process(GREEDY, str(database)) as neighbour:
        assert read_line(neighbour) == "ready"
        result = await persist_once(Settings(database=database))
        assert read_line(neighbour) == "done"

    assert (result.outcome, result.changed_active, result.error) == ("applied", len(keys), None)
    assert {row[2:] for row in read_rows(database)} == {(2, "new")}


async def test_a_newer_snapshot_wins_in_the_middle_of_an_apply(tmp_path: Path) -> None:
    keys = [f"{number:064x}" for number in range(2000)]
    database = make_database(tmp_path / "m.db", [("nodes", key, 0, None) for key in keys])
    ensure_snapshot_dir(database)  # there are no polls to wait for it
    async with bridge(database) as results:
        with other_process(GREEDY, str(database)) as neighbour:
            assert read_line(neighbour) == "ready"
            for evidence in ("first", "second", "third"):
                entries = [(key, "confirmed", evidence) for key in keys]
                put(document(*entries), snapshot_path(database))
            await until(lambda: {row[3] for row in read_rows(database)} == {"third"})
        assert "busy" not in results.outcomes


async def test_a_poll_that_is_quicker_than_the_pause_does_not_push_the_retry_away(
    database: Path,
) -> None:
    async with bridge(database, mode="poll", poll_interval="10ms") as results:
        with locked(database) as release:
            put(SNAPSHOT, snapshot_path(database))
            await until(lambda: len(results.states) > 60)
            release()
        await landed(database)


@pytest.mark.system
def test_waiting_is_told_once_and_so_is_its_end(tmp_path: Path) -> None:
    database = tmp_path / "m.db"
    put(SNAPSHOT, snapshot_path(database))
    with daemon(database, "--sweep-interval=50ms") as process:
        wait_until(lambda: "database_missing" in process.said, "the state")
        make_database(database, [("nodes", "aa11", 0, None)])
        wait_until(lambda: "applied" in process.said, "its end")
    assert process.said.count("database_missing") == 1


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


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """watchdog's constructor would leave an inotify instance and a pipe behind at every attempt."""
    before = open_descriptors()

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for _ in range(5):
            with pytest.raises(OSError, match="thread"):
                inotify.InotifyWatch(tmp_path, lambda: None)
    assert open_descriptors() == before


async def test_a_long_sync_is_not_a_stuck_filesystem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "STUCK_SECONDS", 0.2)
    life = service.Border(lambda _: None)

    def stuck_since() -> float | None:
        return life.state.stuck_since

    assert not await life.wait(), "nobody has told anything"
    assert (life.takes_long, stuck_since()) == (False, None), "no sync is under way"
    life.alive()
    while not life.takes_long:
        await anyio.sleep(0)
        life.alive()
    assert stuck_since() is None, "it gets on"
    life.alive()
    assert life.state.last_progress is not None
    await until(lambda: stuck_since() is not None)
    assert stuck_since() == stuck_since(), "it is the same call all the time"
    life.tell(WatchState(last_sync=1.0), None)
    assert (stuck_since(), life.takes_long) == (None, False)
