"""A `-wal` that is not known to be the database's own is left alone; reading writes nothing.

`test_restore` shows what that is for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiosqlite
import pytest
from anyio import to_thread

from mbcap_watch import ensure_snapshot_dir, snapshot_path
from restores import BACKUP_PACKETS, KEYS, apply, judge, make_packets, neighbour, snapshot
from support import (
    OFF,
    Results,
    bridge,
    connect,
    document,
    other_process,
    put,
    read_line,
    until,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from restores import Process

pytestmark = pytest.mark.anyio

HOUR = 3600.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def meshcore(tmp_path: Path) -> Path:
    """A database with a snapshot that was not applied yet."""
    database = make_packets(tmp_path / "meshcore.db", "live", 300)
    ensure_snapshot_dir(database)
    put(snapshot("first"), snapshot_path(database))
    return database


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    return make_packets(tmp_path / "backup.db", "backup", BACKUP_PACKETS["smaller"])


@contextlib.contextmanager
def running(role: str, database: Path, *arguments: str) -> Iterator[Process]:
    process = neighbour(role, database, *arguments)
    try:
        yield process.ready()
    finally:
        if not process.ended:
            process.end(signal.SIGKILL)


@contextlib.contextmanager
def idle_writer(database: Path) -> Iterator[None]:
    """Have another process open the database, with frames in the `-wal`, that does nothing."""
    script = """
        import sqlite3, sys
        connection = sqlite3.connect(sys.argv[1], isolation_level=None)
        connection.execute("INSERT INTO packets (generation) VALUES ('live')")
        connection.execute("SELECT count(*) FROM packets").fetchall()
        print("ready", flush=True)
        sys.stdin.readline()
    """
    with other_process(script, str(database)) as process:
        assert read_line(process) == "ready"
        yield


def wal_of(database: Path) -> Path:
    return Path(f"{database}-wal")


def names_the_wal(text: str | None, database: Path) -> bool:
    """Whether people learn which file is meant, and what to do."""
    return text is not None and str(database) in text and "-wal" in text and "remove" in text


def remove_wal(database: Path) -> None:
    for suffix in ("-wal", "-shm"):
        Path(f"{database}{suffix}").unlink()


def files(database: Path) -> dict[str, tuple[int, int, int, str] | None]:
    """Return what tells whether the files were touched. For when this process has none open.

    A `-shm` beside an empty `-wal` that nobody has open is nobody's: SQLite makes it anew.
    """
    found: dict[str, tuple[int, int, int, str] | None] = {}
    for suffix in ("", "-wal", "-shm"):
        path = Path(f"{database}{suffix}")
        found[suffix] = None
        if path.exists():
            status = path.stat()
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[suffix] = (status.st_ino, status.st_size, status.st_mtime_ns, digest)
            if suffix == "-shm" and not wal_of(database).stat().st_size:
                found[suffix] = (status.st_ino, status.st_size, 0, "")
    return found


def leave_wal_behind(database: Path) -> None:
    """Have the ingestor die with frames in its `-wal`."""
    with running("ingestor", database, "live"):
        pass
    assert wal_of(database).stat().st_size > 0


def leave_empty_wal(database: Path) -> None:
    """Have the server be the last to close, which cannot tidy up."""
    with running("ingestor", database, "live") as ingestor, running("server", database) as server:
        ingestor.end()
        server.end()
    assert wal_of(database).stat().st_size == 0


# ------------------------------------------------------------------------------ reading


@contextlib.contextmanager
def absent(database: Path, _: Path) -> Iterator[None]:
    assert not wal_of(database).exists()
    yield


@contextlib.contextmanager
def empty(database: Path, _: Path) -> Iterator[None]:
    leave_empty_wal(database)
    yield


@contextlib.contextmanager
def live(database: Path, _: Path) -> Iterator[None]:
    with idle_writer(database):
        yield


@contextlib.contextmanager
def left_behind(database: Path, _: Path) -> Iterator[None]:
    leave_wal_behind(database)
    yield


@contextlib.contextmanager
def replaced(database: Path, backup: Path) -> Iterator[None]:
    with idle_writer(database):
        os.replace(backup, database)
        yield


def dry_run(database: Path, *options: str) -> str | None:
    """Return the outcome; None if it waits."""
    return compare(database, "--dry-run", *options)


def compare(database: Path, *options: str) -> str | None:
    process = apply(database, *options)
    ended = process.ended_or_waits()
    process.end(signal.SIGTERM)
    if ended:
        return str(process.results[-1]["outcome"])
    assert names_the_wal(process.log.read_text(), database)
    return None


def call(database: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mbcap_watch", *arguments, f"--database={database}"],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr


def set_values(database: Path) -> None:
    with connect(database) as connection:
        connection.execute("UPDATE nodes SET multibyte_sup = 2, multibyte_evidence = 'first'")


@pytest.mark.parametrize("read", [dry_run, compare])
@pytest.mark.parametrize("state", [absent, empty, live, left_behind, replaced])
def test_reading_writes_not_a_byte(
    meshcore: Path,
    backup: Path,
    state: Callable[[Path, Path], contextlib.AbstractContextManager[None]],
    read: Callable[[Path], str | None],
) -> None:
    if read is compare:  # else it would write
        set_values(meshcore)
        set_values(backup)
    with state(meshcore, backup):
        before = files(meshcore)
        outcome = read(meshcore)
        assert files(meshcore) == before
    told = "unchanged" if read is compare else "applied"
    assert outcome == (None if state in (left_behind, replaced) else told)


@pytest.mark.parametrize("read", [dry_run, compare])
def test_reading_recovers_nothing_when_the_grace_is_over(
    meshcore: Path, read: Callable[[Path, str], str | None]
) -> None:
    set_values(meshcore)
    leave_wal_behind(meshcore)
    before = files(meshcore)
    assert read(meshcore, "--wal-grace=0") == "unchanged"
    after = files(meshcore)
    assert (after[""], after["-wal"]) == (before[""], before["-wal"])


@pytest.mark.parametrize("command", ["check", "status"])
@pytest.mark.parametrize("state", [absent, empty, live, left_behind, replaced])
def test_who_asks_writes_not_a_byte(
    meshcore: Path,
    backup: Path,
    state: Callable[[Path, Path], contextlib.AbstractContextManager[None]],
    command: str,
) -> None:
    with state(meshcore, backup):
        before = files(meshcore)
        call(meshcore, command)
        assert files(meshcore) == before


async def test_a_bridge_with_nothing_to_write_writes_nothing(meshcore: Path) -> None:
    set_values(meshcore)
    leave_empty_wal(meshcore)
    before = files(meshcore)
    async with bridge(meshcore, resync="100ms") as results:
        await results.count("unchanged", 3)
    assert files(meshcore) == before


# ------------------------------------------------------------------------------ as it was found


@contextlib.contextmanager
def reader(database: Path) -> Iterator[None]:
    """Have another process keep the database open, read-only, and do nothing."""
    script = """
        import sqlite3, sys
        connection = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
        connection.execute("SELECT count(*) FROM packets").fetchall()
        print("ready", flush=True)
        sys.stdin.readline()
        values = connection.execute("SELECT DISTINCT multibyte_evidence FROM nodes").fetchall()
        print(values, flush=True)
    """
    with other_process(script, str(database)) as process:
        assert read_line(process) == "ready"
        yield
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert read_line(process) == "[('first',)]", "it sees what was written"


def test_a_wal_that_was_absent_is_absent_after_our_write(meshcore: Path) -> None:
    assert compare(meshcore) == "applied"
    assert not wal_of(meshcore).exists()


def test_a_wal_that_was_empty_is_empty_after_our_write(meshcore: Path) -> None:
    leave_empty_wal(meshcore)
    assert compare(meshcore) == "applied"
    assert not wal_of(meshcore).exists() or wal_of(meshcore).stat().st_size == 0


def test_a_wal_that_was_empty_is_so_after_our_write_beside_a_reader(meshcore: Path) -> None:
    with reader(meshcore):
        assert wal_of(meshcore).stat().st_size == 0
        assert compare(meshcore) == "applied"
        assert wal_of(meshcore).stat().st_size == 0


async def test_a_bridge_leaves_an_empty_wal_beside_a_reader_after_each_write(
    meshcore: Path,
) -> None:
    with reader(meshcore):
        async with bridge(meshcore) as results:
            for number, evidence in enumerate(["second", "first"], 2):
                put(snapshot(evidence), snapshot_path(meshcore))
                await results.count("applied", number)
                await until(lambda: wal_of(meshcore).stat().st_size == 0, "an empty -wal")


def test_a_wal_in_use_stays_in_use(meshcore: Path) -> None:
    """Beside a writer it is the writer's to empty."""
    with idle_writer(meshcore):
        size = wal_of(meshcore).stat().st_size
        assert compare(meshcore) == "applied"
        assert wal_of(meshcore).stat().st_size > size


# ------------------------------------------------------------------------------ left behind


async def test_a_wal_left_behind_is_left_alone_for_its_grace(meshcore: Path) -> None:
    """After that it is recovered as SQLite does: what its writer committed is not lost."""
    leave_wal_behind(meshcore)
    before = files(meshcore)
    async with bridge(meshcore, sweep_interval="50ms", wal_grace=OFF) as results:
        told = await results.next("foreign_wal")
        assert names_the_wal(told.error, meshcore)
    assert files(meshcore) == before
    async with bridge(meshcore, sweep_interval="50ms", wal_grace="300ms") as results:
        await results.next("foreign_wal")
        await results.next("applied")
    generation, packets = count_packets(meshcore)
    assert generation == "live"
    assert packets > 300


def count_packets(database: Path) -> tuple[str, int]:
    with connect(database) as connection:
        rows = connection.execute("SELECT generation, count(*) FROM packets GROUP BY generation")
        [row] = rows.fetchall()
    return str(row[0]), int(row[1])


@pytest.mark.parametrize("ours", ["apply", "bridge"])
async def test_the_grace_does_not_count_from_when_the_wal_was_written(
    meshcore: Path, backup: Path, ours: str
) -> None:
    """The ingestor may have died long ago; the backup, older still, was moved into place now.

    How long the grace is by default is much longer than this test takes.
    """
    leave_wal_behind(meshcore)
    long_ago = time.time() - HOUR
    for path in (wal_of(meshcore), Path(f"{meshcore}-shm"), meshcore):
        os.utime(path, (long_ago, long_ago))
    os.utime(backup, (long_ago - HOUR, long_ago - HOUR))
    os.replace(backup, meshcore)
    before = files(meshcore)
    if ours == "apply":
        assert compare(meshcore) is None
    else:
        async with bridge(meshcore, sweep_interval="50ms") as results:
            await results.next("foreign_wal")
    assert files(meshcore) == before


def test_apply_goes_on_as_soon_as_the_wal_is_removed(meshcore: Path, backup: Path) -> None:
    leave_wal_behind(meshcore)
    process = apply(meshcore)
    assert not process.ended_or_waits()
    os.replace(backup, meshcore)
    remove_wal(meshcore)
    wait_until(lambda: process.ended)
    process.end()
    assert process.results[-1]["outcome"] == "applied"
    assert count_packets(meshcore) == ("backup", BACKUP_PACKETS["smaller"])


async def test_it_goes_on_as_soon_as_the_ingestor_is_back(meshcore: Path) -> None:
    leave_wal_behind(meshcore)
    async with bridge(meshcore, sweep_interval="50ms") as results:
        await results.next("foreign_wal")
        with running("ingestor", meshcore, "live"):
            await results.next("applied")


async def test_it_goes_on_as_soon_as_the_wal_is_removed(meshcore: Path, backup: Path) -> None:
    leave_wal_behind(meshcore)
    async with bridge(meshcore, sweep_interval="50ms") as results:
        await results.next("foreign_wal")
        os.replace(backup, meshcore)
        remove_wal(meshcore)
        await results.next("applied")
    assert count_packets(meshcore) == ("backup", BACKUP_PACKETS["smaller"])


async def test_the_wal_of_a_file_that_was_replaced_is_never_opened(
    meshcore: Path, backup: Path
) -> None:
    """As long as its writer lives: there is no grace that ends."""
    async with bridge(meshcore, sweep_interval="50ms", wal_grace=0) as results:
        with running("ingestor", meshcore, "live") as ingestor:
            os.replace(backup, meshcore)
            before = files(meshcore)[""]
            known = len(results.all)
            told = await results.next("foreign_wal", after=known)
            assert names_the_wal(told.error, meshcore)
            put(snapshot("second"), snapshot_path(meshcore))
            await results.next("foreign_wal", after=len(results.all))
            assert files(meshcore)[""] == before
            known = len(results.all)
            ingestor.end()
        await results.next("applied", after=known)
    restored = judge(meshcore, BACKUP_PACKETS["smaller"], 0)
    assert restored.whole
    assert restored.values == {(2, "second")}


def test_the_daemon_says_it_once_and_recovers(meshcore: Path) -> None:
    leave_wal_behind(meshcore)
    log = meshcore.with_name("daemon.txt")
    with open(log, "wb") as stderr:
        daemon = subprocess.Popen(
            [
                *(sys.executable, "-m", "mbcap_watch", "run", f"--database={meshcore}"),
                *("--sweep-interval=50ms", "--resync=100ms", "--wal-grace=5s"),
            ],
            stderr=stderr,
        )
    try:
        wait_until(lambda: "applied" in log.read_text(), "the end of the grace")
    finally:
        daemon.terminate()
        assert daemon.wait(30) == 0
    [line] = [line for line in log.read_text().splitlines() if "foreign_wal" in line]
    assert names_the_wal(line, meshcore)


# ------------------------------------------------------------------------------ noticing


async def test_a_backup_that_is_copied_over_the_file_is_noticed_at_the_sweep(
    meshcore: Path, backup: Path
) -> None:
    """Without an event, without another inode, and without a resync."""
    async with bridge(meshcore, mode="inotify", sweep_interval="50ms") as results:
        await results.next("applied")
        for number in range(2, 4):
            shutil.copyfile(backup, meshcore)
            await results.count("applied", number)
            assert judge(meshcore, BACKUP_PACKETS["smaller"], 0).values == {(2, "first")}


async def test_a_backup_that_is_moved_over_the_file_is_noticed_at_the_sweep(
    meshcore: Path, backup: Path
) -> None:
    async with bridge(meshcore, mode="inotify", sweep_interval="50ms") as results:
        await results.next("applied")
        os.replace(backup, meshcore)
        await results.count("applied", 2)
    restored = judge(meshcore, BACKUP_PACKETS["smaller"], 0)
    assert restored.whole
    assert restored.values == {(2, "first")}


async def test_what_is_restored_through_the_wal_is_noticed_at_the_sweep(meshcore: Path) -> None:
    """As `sqlite3 meshcore.db ".restore backup.db"` does; the path may be a link to the file."""
    link = meshcore.with_name("link") / "meshcore.db"
    link.parent.mkdir()
    link.symlink_to(meshcore)
    with idle_writer(meshcore):
        async with bridge(
            link, mode="inotify", sweep_interval="50ms", snapshot_dir=snapshot_path(meshcore).parent
        ) as results:
            await results.next("applied")
            with connect(meshcore) as connection:
                connection.execute("UPDATE nodes SET multibyte_sup = 0, multibyte_evidence = NULL")
            await results.count("applied", 2)
    assert judge(meshcore, 0, 0).values == {(2, "first")}


async def test_a_copy_that_takes_long_comes_to_no_harm(meshcore: Path, backup: Path) -> None:
    """Half of a file is met again and again; it is not written to until it is whole."""
    async with bridge(meshcore, sweep_interval="50ms", resync="100ms") as results:
        await results.next("applied")
        data = backup.read_bytes()
        with open(meshcore, "wb", buffering=0) as file:
            for start in range(0, len(data), len(data) // 6):
                file.write(data[start : start + len(data) // 6])
                known = len(results.all)
                await until(lambda n=known: len(results.all) >= n + 2, "a sync of it")  # type: ignore[misc]
        known = len(results.all)
        await until(
            lambda: {"applied", "unchanged"} & set(results.outcomes[known + 1 :]), "a recovery"
        )
    restored = judge(meshcore, BACKUP_PACKETS["smaller"], 0)
    assert restored.whole
    assert restored.values == {(2, "first")}


# ------------------------------------------------------------------------------ locks

# Who holds the locks by which a connection to a database in WAL mode is known: of the database its
# SHARED bytes, of the -shm the byte 128 (SQLite's os.h and wal.c). None of them is taken.
_HOLDERS = """
    import fcntl, os, struct, sys
    for line in sys.stdin:
        database = line.strip()
        for path, start, length in ((database, 1073741826, 510), (database + "-shm", 128, 1)):
            with open(path, "rb+") as file:
                asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
                kind, _, _, _, pid = struct.unpack(
                    "hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked)
                )
            print(pid if kind != fcntl.F_UNLCK else 0, flush=True)
"""


@contextlib.contextmanager
def holders() -> Iterator[Callable[[Path], tuple[int, int]]]:
    """Yield what asks, from another process, who holds the locks of database and `-shm`."""
    with other_process(_HOLDERS) as process:

        def ask(database: Path) -> tuple[int, int]:
            assert process.stdin is not None
            process.stdin.write(f"{database}\n")
            process.stdin.flush()
            return int(read_line(process)), int(read_line(process))

        yield ask


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
                with running("ingestor", meshcore, "live"):
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


async def test_nothing_is_written_through_files_that_were_removed_under_the_host(
    meshcore: Path,
) -> None:
    """Others have new ones: two that do not see each other's locks would write to one file."""
    async with hosts_connection(meshcore):
        remove_wal(meshcore)
        with running("ingestor", meshcore, "live"):
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
    with idle_writer(meshcore):
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
