"""Asking whose the `-wal` is: the answers, and that nobody loses a lock by a question."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from fuse import fuse
from machine import mounted
from mbcap_watch import Settings, snapshot_path, watch
from mbcap_watch.errors import DatabaseFailed, ForeignWal
from mbcap_watch.store import descriptors, wal
from mbcap_watch.store.native import Connection
from mbcap_watch.store.wal import Wal, require_own_wal
from support import (
    connect,
    document,
    holders,
    in_use,
    make_database,
    open_descriptors,
    put,
    until,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mbcap_watch import PersistResult

pytestmark = pytest.mark.anyio

ROWS = [("nodes", "aa11", 0, None)]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    made = make_database(tmp_path / "m.db", ROWS)
    put(document(("aa11", "confirmed")), snapshot_path(made))
    return made


def left_behind(database: Path) -> None:
    """Have a program killed that has rows in its -wal."""
    with in_use(database):
        pass


async def apply(database: Path, grace: float = 60.0) -> PersistResult:
    """Return the first result; unlike `persist_once`, the bridge tells of it and waits on."""
    async with watch(Settings(database, wal_grace=grace)) as results:
        return await anext(results)


async def test_a_wal_that_this_process_uses_is_its_own(database: Path) -> None:
    """The locks of a host's own connection count, and are still held after the question."""
    with connect(database) as connection:
        connection.execute("INSERT INTO nodes (public_key) VALUES ('in the wal')")
        assert require_own_wal(database, 60.0) is Wal.IN_USE
        assert (await apply(database)).outcome == "applied"
        with holders() as ask:
            assert ask(database) == (os.getpid(), os.getpid())


def test_readers_that_come_and_go_do_not_put_off_recovery(database: Path) -> None:
    """Each leaves its mark in the -shm."""
    left_behind(database)

    def is_old_enough() -> bool:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as server:
            server.execute("SELECT count(*) FROM nodes").fetchall()
        try:
            return require_own_wal(database, 0.3) is Wal.LEFT_BEHIND
        except ForeignWal:
            return False

    wait_until(is_old_enough)


@pytest.mark.parametrize("grace", [0.0, 60.0])
def test_the_clock_was_set_back_since(
    database: Path, grace: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(database)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600.0)
    assert require_own_wal(database, grace) is Wal.LEFT_BEHIND


def test_the_last_connection_is_closed_during_the_question(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite removes the -wal then: 2 of 4,000 questions beside a program that comes and goes."""
    ask = wal._held_lock

    def closed_meanwhile(*question: Any) -> int:
        answer = ask(*question)
        release()
        return answer

    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("INSERT INTO nodes (public_key) VALUES ('in the wal')")
        release = connection.close
        monkeypatch.setattr(wal, "_held_lock", closed_meanwhile)
        assert require_own_wal(database, 60.0) is Wal.ABSENT


def test_a_file_that_is_replaced_between_the_question_and_the_opening(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if the -wal is still to be emptied: it is not that of the new file."""
    backup = make_database(tmp_path / "backup.db", [*ROWS, ("nodes", "backup", 0, None)])
    before = backup.read_bytes()

    def replaced(path: Path, grace: float) -> Wal:
        found = require_own_wal(path, grace)
        os.replace(backup, path)
        return found

    with in_use(database):
        monkeypatch.setattr(wal, "require_own_wal", replaced)
        with pytest.raises(DatabaseFailed, match="replaced"):
            Connection(database, 60.0, owes_checkpoint=True).close()
    assert database.read_bytes() == before


def open_here(database: Path) -> list[str]:
    """Return which files beside the database this process has open."""
    return [
        file.removeprefix(f"{database}")
        for each in os.scandir("/proc/self/fd")
        if (file := os.readlink(each.path) if os.path.islink(each.path) else "").startswith(
            str(database)
        )
    ]


async def test_a_descriptor_to_ask_with_is_kept_while_the_bridge_runs(
    database: Path, tmp_path: Path
) -> None:
    """Closing one would drop the locks that a host's connection has got a moment before."""
    backup = make_database(tmp_path / "backup.db", ROWS)
    async with watch(Settings(database, resync="0.1s")) as results:
        with in_use(database):
            while sorted(open_here(database)) != ["", "-shm"]:
                await anext(results)
        while (await anext(results)).outcome != "foreign_wal":  # from now on it opens nothing
            pass
        assert sorted(open_here(database)) == ["", "-shm"]
        os.replace(backup, database)
        for side in ("-wal", "-shm"):
            os.unlink(f"{database}{side}")
        while (await anext(results)).outcome != "applied":
            pass
        assert open_here(database) == [""]
    assert open_here(database) == []


async def test_nothing_is_kept_of_a_file_that_a_link_no_longer_leads_to(tmp_path: Path) -> None:
    """Else the room of one that is deleted would not be free before the process ends."""
    link, new = tmp_path / "link.db", tmp_path / "new.db"
    put(document(("aa11", "confirmed")), snapshot_path(link))
    versions = [make_database(tmp_path / f"{number}.db", ROWS) for number in range(3)]
    with contextlib.ExitStack() as stack:
        for version in versions:
            stack.enter_context(in_use(version))
        link.symlink_to(versions[0])
        async with watch(Settings(link, sweep_interval="0.05s", resync="0.1s")):
            for number, version in enumerate(versions):
                new.symlink_to(version)
                os.replace(new, link)
                await until(lambda: sorted(open_here(version)) == ["", "-shm"])  # noqa: B023
                await until(lambda: not any(map(open_here, versions[:number])))  # noqa: B023
        assert not any(map(open_here, versions))


@contextlib.contextmanager
def coming_and_going(database: Path) -> Iterator[None]:
    """Have a thread of the host open and close the database all the time."""
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            with connect(database) as connection:
                connection.execute("SELECT count(*) FROM nodes").fetchall()

    host = threading.Thread(target=come_and_go)
    host.start()
    try:
        yield
    finally:
        ended.set()
        host.join()


def test_what_the_host_has_open_does_not_answer_for_the_database(database: Path) -> None:
    """It may be a mere place (O_PATH), and a connection may close it at any moment."""
    place = os.open(database, os.O_PATH)
    try:
        with in_use(database), coming_and_going(database):
            found = {require_own_wal(database, 60.0) for _ in range(1000)}
    finally:
        os.close(place)
    assert found == {Wal.IN_USE}


def test_a_connection_of_the_host_that_is_being_closed(database: Path) -> None:
    """SQLite removes the -shm before it closes it: that is not somebody else's doing."""
    with coming_and_going(database):
        for _ in range(3000):
            require_own_wal(database, 60.0)


def test_a_fifo_in_place_of_the_shm(database: Path) -> None:
    left_behind(database)
    os.unlink(f"{database}-shm")
    os.mkfifo(f"{database}-shm")
    with pytest.raises(ForeignWal):
        require_own_wal(database, 60.0)


@pytest.mark.system
def test_a_descriptor_of_the_host_on_a_mount_that_does_not_answer(
    database: Path, tmp_path: Path
) -> None:
    far, near = tmp_path / "far", tmp_path / "near"
    far.mkdir()
    near.mkdir()
    (far / "file").touch()
    with (
        fuse("bindfs", far, near, "-o", "attr_timeout=0") as process,
        open(near / "file", "rb"),
        connect(database) as other,
    ):
        other.execute("INSERT INTO nodes (public_key) VALUES ('in the wal')")
        process.send_signal(signal.SIGSTOP)
        # If it hangs, this test shall fail and not hang.
        rescue = threading.Timer(8, process.send_signal, [signal.SIGCONT])
        rescue.start()
        assert require_own_wal(database, 60.0) is Wal.IN_USE
        descriptors.release(database)
        assert rescue.is_alive(), "it waited for the mount"
        rescue.cancel()
        rescue.join()
        process.send_signal(signal.SIGCONT)  # to close a file, its server is asked as well
    descriptors.release(database)


async def test_a_bridge_ends_where_no_descriptor_is_left(database: Path) -> None:
    """It cannot ask then whether its process has the file open, and so closes no descriptor of it.

    An error at that point would leave the observer and its threads behind.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    put(document(("aa11", "confirmed")), snapshot_path(database))
    with in_use(database):
        before, threads = open_descriptors(), threading.active_count()
        with contextlib.ExitStack() as others:
            async with watch(Settings(database)) as results:
                assert (await anext(results)).outcome == "applied"
                others.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
                most = max(map(int, os.listdir("/proc/self/fd")))
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
                with contextlib.suppress(OSError):
                    while True:
                        others.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        wait_until(lambda: threading.active_count() == threads, "the end of the observer's threads")
        wait_until(lambda: open_descriptors() == before, "closing of what the bridge had open")
        descriptors.release(database)


@pytest.mark.system
def test_the_host_has_the_database_open_by_another_mount(database: Path, tmp_path: Path) -> None:
    """The same file: closing a descriptor of it drops the locks of that connection, too."""
    near = tmp_path / "near"
    with mounted(near, "--bind", str(tmp_path)), connect(near / database.name) as connection:
        connection.execute("INSERT INTO nodes (public_key) VALUES ('in the wal')")
        assert require_own_wal(database, 60.0) is Wal.IN_USE
        descriptors.release(database)
        with holders() as ask:
            assert ask(database) == (os.getpid(), os.getpid())
    descriptors.release(database)
