"""A `-wal` that is not known to be the database's own is left alone; reading writes nothing.

`test_restore` shows what that is for.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from machine import mounted
from mbcap_watch import Settings, persist_once, snapshot_path
from mbcap_watch.bridge.sync import Syncer
from mbcap_watch.errors import DatabaseBusy, ForeignWal
from mbcap_watch.store.descriptors import opening_lock
from mbcap_watch.store.native import Connection, has_reset_bug
from mbcap_watch.store.wal import Wal, require_own_wal
from processes import apply, call, neighbour, running, start_daemon
from restores import BACKUP_PACKETS, judge, make_packets, remove_wal, snapshot
from support import (
    OFF,
    bridge,
    close_as_a_server_that_is_gone,
    connect,
    open_descriptors,
    other_process,
    put,
    read_line,
    until,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio

HOUR = 3600.0


def wal_of(database: Path) -> Path:
    return Path(f"{database}-wal")


def names_the_wal(text: str | None, database: Path) -> bool:
    """Whether people learn which file is meant, and what to do."""
    return text is not None and str(database) in text and "-wal" in text and "remove" in text


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
            if suffix == "-shm" and found["-wal"] and not wal_of(database).stat().st_size:
                found[suffix] = (status.st_ino, status.st_size, 0, "")
    return found


def leave_wal_behind(database: Path) -> None:
    """Have the ingestor die with frames in its `-wal`."""
    with running(neighbour("ingestor", database, "live")):
        pass
    assert wal_of(database).stat().st_size > 0


def leave_empty_wal(database: Path) -> None:
    """Have the server be the last to close, which cannot tidy up."""
    ingestor = neighbour("ingestor", database, "live")
    server = neighbour("server", database)
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
    with running(neighbour("idler", database)):
        yield


@contextlib.contextmanager
def left_behind(database: Path, _: Path) -> Iterator[None]:
    leave_wal_behind(database)
    yield


@contextlib.contextmanager
def replaced(database: Path, backup: Path) -> Iterator[None]:
    with running(neighbour("idler", database)):
        os.replace(backup, database)
        yield


def compare(database: Path, *options: str) -> str | None:
    """Return the outcome of `apply`; None if it waits."""
    process = apply(database, *options)
    ended = process.ended_or_waits()
    process.end(signal.SIGTERM)
    if ended:
        return str(process.results[-1]["outcome"])
    assert names_the_wal(process.said, database)
    return None


def set_values(database: Path) -> None:
    with connect(database) as connection:
        connection.execute("UPDATE nodes SET multibyte_sup = 2, multibyte_evidence = 'first'")


State = Callable[[Path, Path], contextlib.AbstractContextManager[None]]
EACH_STATE = pytest.mark.parametrize("state", [absent, empty, live, left_behind, replaced])


@EACH_STATE
def test_who_asks_writes_not_a_byte(meshcore: Path, backup: Path, state: State) -> None:
    with state(meshcore, backup):
        before = files(meshcore)
        outcome = compare(meshcore, "--dry-run")
        assert files(meshcore) == before
        for command in ("check", "status"):
            assert "Traceback" not in call(command, f"--database={meshcore}").stderr
            assert files(meshcore) == before
    assert outcome == (None if state in (left_behind, replaced) else "applied")


@EACH_STATE
def test_who_has_nothing_to_write_writes_not_a_byte(
    meshcore: Path, backup: Path, state: State
) -> None:
    set_values(meshcore)
    set_values(backup)
    with state(meshcore, backup):
        before = files(meshcore)
        outcome = compare(meshcore)
        assert files(meshcore) == before
    assert outcome == (None if state in (left_behind, replaced) else "unchanged")


@pytest.mark.parametrize("options", [["--dry-run"], []], ids=str)
def test_reading_recovers_nothing_when_the_grace_is_over(
    meshcore: Path, options: list[str]
) -> None:
    set_values(meshcore)
    leave_wal_behind(meshcore)
    before = files(meshcore)
    assert compare(meshcore, "--wal-grace=0", *options) == "unchanged"
    after = files(meshcore)
    assert (after[""], after["-wal"]) == (before[""], before["-wal"])


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


def test_an_empty_wal_stays_as_it_is(meshcore: Path) -> None:
    """Removing it would lock out, for a moment, a read-only server that does not wait."""
    leave_empty_wal(meshcore)
    before = sorted(os.listdir(meshcore.parent))
    for outcome in ("applied", "unchanged"):
        assert compare(meshcore) == outcome
        assert wal_of(meshcore).stat().st_size == 0
    assert {*before, "apply.txt"} == set(os.listdir(meshcore.parent))


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


async def test_a_reader_in_the_middle_of_its_rows(meshcore: Path) -> None:
    """It keeps the -wal from being emptied; the bridge does that once the reader is through."""
    with contextlib.closing(sqlite3.connect(f"file:{meshcore}?mode=ro", uri=True)) as server:
        half_read = server.execute("SELECT 1 FROM nodes UNION ALL SELECT 2 UNION ALL SELECT 3")
        half_read.fetchone()
        async with bridge(meshcore, sweep_interval="50ms") as results:
            await results.next("applied")
            assert wal_of(meshcore).stat().st_size > 0
            half_read.close()
            await until(lambda: wal_of(meshcore).stat().st_size == 0, "an empty -wal")


@pytest.mark.parametrize("case", ["mv while open", "cp while closing", "cp when closed"])
async def test_a_backup_comes_while_a_reader_keeps_the_wal_from_being_emptied(
    meshcore: Path, case: str
) -> None:
    """What is still to be moved from the -wal is of the file before, and never of the backup."""
    backup = make_packets(meshcore.with_name("backup.db"), "backup", 290)  # about as long
    whole = backup.read_bytes()
    script = """
        import sqlite3, sys
        connection = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
        half_read = connection.execute("SELECT 1 FROM nodes UNION ALL SELECT 2")
        half_read.fetchone()
        print("ready", flush=True)
        sys.stdin.readline()
        half_read.close()
        print("through", flush=True)
        sys.stdin.readline()
    """
    with other_process(script, str(meshcore)) as server:
        assert read_line(server) == "ready"
        replace = partial(subprocess.run, [case[:2], backup, meshcore], check=True)
        later = threading.Timer(0.1, replace)

        def on_progress(*_: int) -> None:
            if wal_of(meshcore).stat().st_size and backup.exists():  # it was written to
                if case == "mv while open":
                    replace()
                elif case == "cp while closing" and not later.ident:
                    later.start()

        with contextlib.closing(Syncer(Settings(meshcore), on_progress=on_progress)) as syncer:
            report = await syncer.sync("start")
            assert report.error is None
            if case == "cp when closed":
                replace()
            elif later.ident:
                later.join()
            assert server.stdin is not None
            server.stdin.write("\n")
            server.stdin.flush()
            assert read_line(server) == "through"
            await syncer.sync("retry")
            server.kill()
            server.wait()
            await syncer.sync("retry")
            assert meshcore.read_bytes() == whole


def test_a_wal_in_use_stays_in_use(meshcore: Path) -> None:
    """Beside a writer it is the writer's to empty."""
    with running(neighbour("idler", meshcore)):
        size = wal_of(meshcore).stat().st_size
        assert compare(meshcore) == "applied"
        assert wal_of(meshcore).stat().st_size > size


@pytest.mark.parametrize("sql", ["SELECT 1 FROM nodes", "UPDATE nodes SET multibyte_sup = 2"])
def test_a_wal_whose_writer_is_killed_while_we_have_it_open(meshcore: Path, sql: str) -> None:
    """To close as the last one would move it into the database, whatever is there by now."""
    with running(neighbour("idler", meshcore)) as idler:
        ours = Connection(meshcore, 60.0, owes_checkpoint=False)
        ours.execute(sql).fetchall()
        idler.end(signal.SIGKILL)
        before, size = meshcore.stat().st_mtime_ns, wal_of(meshcore).stat().st_size
        ours.close()
    assert (meshcore.stat().st_mtime_ns, wal_of(meshcore).stat().st_size) == (before, size)


@pytest.mark.parametrize("side", ["-wal", "-shm"])
def test_nothing_is_written_once_a_file_beside_is_removed(meshcore: Path, side: str) -> None:
    """An operator removes one after the other, and the bridge opens the database in between."""
    ours = Connection(meshcore, 60.0, owes_checkpoint=False)
    ours.execute("UPDATE nodes SET multibyte_sup = 2")
    os.unlink(f"{meshcore}{side}")
    before = meshcore.stat().st_mtime_ns
    with pytest.raises(DatabaseBusy, match=f"had its {side} removed by another process"):
        ours.require_same_files()
    ours.close()
    assert meshcore.stat().st_mtime_ns == before


@pytest.mark.parametrize("role", ["server", None])
@pytest.mark.parametrize("size", ["smaller", "larger", "equal"])
@pytest.mark.parametrize("sql", ["SELECT * FROM nodes", "UPDATE nodes SET multibyte_sup = 2"])
def test_nothing_is_written_once_a_backup_is_copied_over_it(
    meshcore: Path, sql: str, size: str, role: str | None
) -> None:
    """What we have read by then is of the file before, and would be written into the backup."""
    backup = meshcore.with_name("backup.db")
    if size == "equal":
        shutil.copyfile(meshcore, backup)
        with connect(backup) as connection:
            connection.execute("UPDATE nodes SET name = 'backup'")
    else:
        make_packets(backup, "backup", BACKUP_PACKETS[size])
    with running(neighbour(role, meshcore)) if role else contextlib.nullcontext():
        ours = Connection(meshcore, 60.0, owes_checkpoint=False)
        ours.execute(sql).fetchall()
        shutil.copyfile(backup, meshcore)
        if sql.startswith("SELECT"):
            with pytest.raises(DatabaseBusy, match="was overwritten by another process"):
                ours.require_same_files()
        ours.close()
        assert meshcore.read_bytes() == backup.read_bytes()
        if not role:  # else it may use what is there
            assert wal_of(meshcore).stat().st_size == 0


async def test_a_copy_that_comes_after_our_commit(meshcore: Path, backup: Path) -> None:
    """What is in the -wal would be replayed into it. It is dropped, and the sync begins anew."""

    def on_progress(*_: int) -> None:
        if backup.exists() and wal_of(meshcore).stat().st_size:
            subprocess.run(["cp", backup, meshcore], check=True)
            backup.unlink()

    with contextlib.closing(Syncer(Settings(meshcore), on_progress=on_progress)) as syncer:
        assert isinstance((await syncer.sync("start")).error, DatabaseBusy)
        assert (await syncer.sync("retry")).error is None
    restored = judge(meshcore, BACKUP_PACKETS["smaller"], 0)
    assert restored.whole
    assert restored.values == {(2, "first")}


def test_nothing_is_written_into_a_copy_that_has_just_begun(meshcore: Path) -> None:
    """`cp` empties the file first. SQLite takes an empty one for a database of its own kind."""
    ours = Connection(meshcore, 60.0, owes_checkpoint=False)
    ours.execute("UPDATE packets SET payload = randomblob(300)")
    os.truncate(meshcore, 0)
    ours.close()
    assert meshcore.stat().st_size == 0


def test_the_wal_beside_a_file_that_is_empty_by_now(meshcore: Path) -> None:
    """SQLite removes it, whoever uses it."""
    with running(neighbour("idler", meshcore)):
        size = wal_of(meshcore).stat().st_size
        os.truncate(meshcore, 0)
        with pytest.raises(ForeignWal, match="another file was copied over it while it is open"):
            Connection(meshcore, 60.0, owes_checkpoint=False)
        assert wal_of(meshcore).stat().st_size == size


def test_a_checkpoint_of_others_is_no_other_file(meshcore: Path) -> None:
    ours = Connection(meshcore, 60.0, owes_checkpoint=False)
    with connect(meshcore) as writer:
        writer.execute("UPDATE nodes SET multibyte_sup = 1")
        writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        ours.require_same_files()
        ours.close()
        ours = Connection(meshcore, 60.0, owes_checkpoint=False)
        for value in (2, 3, 2):
            ours.execute("UPDATE nodes SET multibyte_sup = ?", (value,))
            writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()  # of what we wrote
            ours.require_same_files()
        ours.close()
        assert wal_of(meshcore).stat().st_size == 0


def test_a_link_that_leads_elsewhere_by_now(meshcore: Path, tmp_path: Path) -> None:
    """Whose -wal lies beside the other database was not asked."""
    link, other = tmp_path / "link.db", tmp_path / "other.db"
    shutil.copy(meshcore, other)
    leave_wal_behind(other)
    leave_empty_wal(meshcore)
    link.symlink_to(meshcore)
    ours = Connection(link, 60.0, owes_checkpoint=False)
    before = files(other)
    link.unlink()
    link.symlink_to(other)
    ours.close()
    assert files(other) == before
    assert wal_of(meshcore).exists()


def test_a_database_that_changes_to_wal_meanwhile_lost_nothing(meshcore: Path) -> None:
    with connect(meshcore) as connection:
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()
    ours = Connection(meshcore, 60.0, owes_checkpoint=False)
    with contextlib.closing(ours), running(neighbour("ingestor", meshcore, "live")):
        ours.require_same_files()
        ours.execute("UPDATE nodes SET multibyte_sup = 2")
    assert judge(meshcore, 0, 0).values == {(2, None)}


# ------------------------------------------------------------------------------ left behind


async def test_a_wal_left_behind_is_left_alone_for_its_grace(meshcore: Path) -> None:
    """After that it is recovered as SQLite does: what its writer committed is not lost."""
    leave_wal_behind(meshcore)
    before = files(meshcore)
    async with bridge(meshcore, sweep_interval="50ms", wal_grace=OFF) as results:
        told = await results.next("foreign_wal")
        assert told.cause == "wal_left_behind"
        assert names_the_wal(told.error, meshcore)
    assert files(meshcore) == before
    settings = Settings(meshcore, wal_grace="300ms", busy_deadline=0)
    told = await persist_once(settings)
    assert told.outcome == "applied", "it waits for the grace, though not for a lock"
    generation, packets = count_packets(meshcore)
    assert generation == "live"
    assert packets > 300


def count_packets(database: Path) -> tuple[str, int]:
    with connect(database) as connection:
        rows = connection.execute("SELECT generation, count(*) FROM packets GROUP BY generation")
        [row] = rows.fetchall()
    return str(row[0]), int(row[1])


async def test_the_grace_does_not_count_from_when_the_wal_was_written(
    meshcore: Path, backup: Path
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
    async with bridge(meshcore, sweep_interval="50ms") as results:
        assert (await results.next("foreign_wal")).cause == "wal_left_behind"
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
        with running(neighbour("ingestor", meshcore, "live")):
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
        with running(neighbour("ingestor", meshcore, "live")) as ingestor:
            os.replace(backup, meshcore)
            before = files(meshcore)[""]
            known = len(results.all)
            told = await results.next("foreign_wal", after=known)
            assert told.cause == "wal_replaced"
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


@pytest.mark.parametrize(
    "how", ["by another path", "by a path with a -wal", "removed", "-wal removed", "-wal emptied"]
)
async def test_what_is_open_with_another_wal_is_left_alone(
    meshcore: Path, tmp_path: Path, how: str
) -> None:
    """A container that has the file alone sees no -wal of others; two of them damage it."""
    ours = meshcore
    with running(neighbour("idler", meshcore)):
        if how == "removed":
            remove_wal(meshcore)
        elif how == "-wal removed":
            wal_of(meshcore).unlink()
        elif how == "-wal emptied":
            os.truncate(wal_of(meshcore), 0)
        else:
            ours = tmp_path / "container" / "meshcore.db"
            ours.parent.mkdir()
            os.link(meshcore, ours)
            put(snapshot_path(meshcore).read_bytes(), snapshot_path(ours))
        if how == "by a path with a -wal":
            wal_of(ours).write_bytes(b"left behind")
        before = files(ours)
        async with bridge(ours, sweep_interval="50ms", wal_grace=0) as results:
            told = await results.next("foreign_wal")
            assert told.cause == "wal_elsewhere"
            assert files(ours) == before


@pytest.mark.system
@pytest.mark.parametrize("leave, found", [("empty", Wal.EMPTY), ("behind", Wal.LEFT_BEHIND)])
def test_a_server_on_a_mount_that_is_read_only(
    meshcore: Path, tmp_path: Path, leave: str, found: Wal
) -> None:
    """It has the database open, and locks no -shm."""
    {"empty": leave_empty_wal, "behind": leave_wal_behind}[leave](meshcore)
    near, log = tmp_path / "near", tmp_path / "log.txt"
    with (
        mounted(near, "--bind", "-o", "ro", str(meshcore.parent)),
        running(neighbour("server", near / meshcore.name, log=log)),
        opening_lock(meshcore),
    ):
        assert require_own_wal(meshcore, 0.0) is found


def test_the_daemon_says_it_once_and_recovers(meshcore: Path) -> None:
    leave_wal_behind(meshcore)
    clocks = ("--sweep-interval=50ms", "--resync=100ms", "--wal-grace=2s")
    with running(start_daemon(meshcore, *clocks)) as process:

        def told() -> bool:
            os.utime(wal_of(meshcore))  # the grace begins anew
            return "wal_left_behind" in process.said

        wait_until(told, "the first look")
        wait_until(lambda: "applied" in process.said, "the end of the grace")
        assert process.end(signal.SIGTERM) == 0
    [line] = [line for line in process.said.splitlines() if "wal_left_behind" in line]
    assert names_the_wal(line, meshcore)


# ------------------------------------------------------------------------------ not at rest


def test_a_neighbour_that_opens_and_closes_is_no_false_alarm(meshcore: Path) -> None:
    """One file is asked about after the other, and the neighbour may be anywhere between."""
    script = """
        import contextlib, sqlite3, sys
        print("ready", flush=True)
        while True:
            connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
            with contextlib.closing(connection):
                connection.execute("UPDATE nodes SET last_seen = random()")
    """
    with other_process(script, str(meshcore)) as process:
        assert read_line(process) == "ready"
        for _ in range(1_000):
            # A connection that is being closed does have it for itself alone.
            with opening_lock(meshcore), contextlib.suppress(DatabaseBusy):
                require_own_wal(meshcore, HOUR)


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


@pytest.mark.parametrize("size", ["smaller", "larger"])
async def test_a_backup_that_is_copied_over_a_file_that_is_open(meshcore: Path, size: str) -> None:
    """The -shm still tells the length of the file before: what is written would do harm later."""
    backup = make_packets(meshcore.with_name("backup.db"), "backup", BACKUP_PACKETS[size])
    with running(neighbour("server", meshcore)) as server:
        async with bridge(meshcore, sweep_interval="50ms") as results:
            await results.next("applied")
            shutil.copyfile(backup, meshcore)
            told = await results.next("foreign_wal")
            assert names_the_wal(told.error, meshcore)
            assert wal_of(meshcore).stat().st_size == 0
            assert meshcore.read_bytes() == backup.read_bytes()
            server.end()
            await results.count("applied", 2)
    restored = judge(meshcore, BACKUP_PACKETS[size], 0)
    assert restored.whole
    assert restored.values == {(2, "first")}


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
    with running(neighbour("idler", meshcore)):
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


async def test_descriptors_are_not_kept(meshcore: Path) -> None:
    with running(neighbour("idler", meshcore)):
        before = open_descriptors()
        await persist_once(Settings(meshcore))
        assert open_descriptors() == before


async def test_descriptors_are_not_kept_where_closing_fails(
    meshcore: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(neighbour("idler", meshcore)):
        before = open_descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(os, "close", close_as_a_server_that_is_gone)
            assert (await persist_once(Settings(meshcore))).compared
        assert open_descriptors() == before


async def test_no_descriptor_is_kept_twice_where_files_cannot_be_told_apart(
    meshcore: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def fails(path: str | int, **options: bool) -> os.stat_result:
        if str(path).endswith("-shm"):
            raise OSError(errno.EIO, "Input/output error")
        return stat(path, **options)

    with running(neighbour("idler", meshcore)):
        before = open_descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", fails)
            async with bridge(meshcore) as results:
                for _ in range(3):
                    assert (await results.sync()).outcome == "failed"
        assert open_descriptors() == before


# ------------------------------------------------------------------------------ which SQLite


@pytest.mark.parametrize(
    "version, affected",
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 53, 0), False),
    ],
)
def test_which_sqlite_has_the_wal_reset_bug(version: tuple[int, int, int], affected: bool) -> None:
    assert has_reset_bug(version) is affected


def test_a_second_sqlite_in_the_process(meshcore: Path) -> None:
    script = """
        import asyncio, logging, sys
        import apsw
        from mbcap_watch import Settings, persist_once
        logging.basicConfig(stream=sys.stdout)
        for _ in range(2):
            asyncio.run(persist_once(Settings(sys.argv[1])))
        print("end")
    """
    pytest.importorskip("apsw")
    with other_process(script, str(meshcore)) as process:
        assert "apsw is loaded beside" in read_line(process)
        assert read_line(process) == "end"
