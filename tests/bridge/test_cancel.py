"""Cancellation of every kind. At every turn of the host's loop: `campaigns/cancellations.py`.

Afterwards: no open transaction, no lock, no thread, no descriptor, and the loop closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import anyio
import pytest

from campaigns.campaign import play_round
from campaigns.strikes import (
    Aim,
    again_and_again,
    by_scope,
    by_scope_and_native,
    everything,
    native,
)
from mbcap_watch import PersistResult, Settings, persist_once, snapshot_path
from support import (
    DEADLINE,
    at_rest,
    but_for_slowness,
    connect,
    document,
    locked,
    make_database,
    open_descriptors,
    put,
    read_rows,
    threads_beside,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from campaigns.strikes import Way

KEYS = [f"{number:04}" for number in range(60)]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database with the nodes of `KEYS`."""
    return make_database(tmp_path / "m.db", [("nodes", key, 0, None) for key in KEYS])


@pytest.fixture
def check(database: Path) -> Callable[[], None]:
    """Call it at the end: nothing is left behind, and what was written is right."""
    threads, descriptors = at_rest(), len(open_descriptors())

    def check() -> None:
        wait_until(lambda: not threads_beside(threads), f"an end of all threads but {threads}")
        wait_until(lambda: len(open_descriptors()) <= descriptors, "closing of all descriptors")
        with connect(database, timeout=0) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        assert {row[2:] for row in read_rows(database)} <= {(0, None), (2, "a"), (1, "b")}

    return check


def values(connection: sqlite3.Connection) -> set[tuple[int, str | None]]:
    sql = "SELECT DISTINCT multibyte_sup, multibyte_evidence FROM {}"
    tables = " UNION ".join(sql.format(table) for table in ("nodes", "inactive_nodes"))
    return set(connection.execute(tables))


def lock_between_two_batches(connection: sqlite3.Connection) -> None:
    """Take the write lock as soon as some rows are written, and others are not."""
    deadline = time.monotonic() + DEADLINE
    while True:
        assert time.monotonic() < deadline, "the lock was never free between two batches"
        with contextlib.suppress(sqlite3.OperationalError):  # it is not free
            connection.execute("BEGIN IMMEDIATE")
            if len(values(connection)) > 1:
                return
            connection.execute("ROLLBACK")


def test_some_turns() -> None:
    """On every Python."""
    assert play_round("cancellations", 1, 35)["cancellations"] == 35


@pytest.mark.parametrize(
    "way", [native, again_and_again, by_scope, by_scope_and_native, everything]
)
def test_persist_once_is_cancelled_between_two_batches(
    database: Path, check: Callable[[], None], way: Way
) -> None:
    keys = [f"{number:04}" for number in range(1000)]
    with connect(database) as connection:
        connection.execute("BEGIN")
        connection.executemany("INSERT OR IGNORE INTO nodes (public_key) VALUES (?)", zip(keys))
        connection.execute("COMMIT")
    settings = Settings(database=database, batch_rows=1)
    put(document(*((key, "confirmed", "a") for key in keys)), snapshot_path(database))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with anyio.CancelScope() as scope:
            task = asyncio.current_task()
            assert task is not None
            aim, left = Aim(task, scope, asyncio.timeout(None)), threading.Event()

            def strike_between_two_batches() -> None:
                with connect(database, timeout=0) as neighbour:
                    lock_between_two_batches(neighbour)
                    loop.call_soon_threadsafe(way, aim)
                    assert left.wait(DEADLINE), "whoever waits for the lock can be cancelled"
                    neighbour.execute("ROLLBACK")

            thread = threading.Thread(target=strike_between_two_batches)
            thread.start()
            try:
                await persist_once(settings)
            finally:
                left.set()
                thread.join()

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(main())
    check()
    with connect(database) as connection:
        assert values(connection) == {(0, None), (2, "a")}


@pytest.mark.parametrize("seed", range(3))
def test_a_deadline_of_the_host_while_somebody_holds_the_lock(
    database: Path, check: Callable[[], None], seed: int
) -> None:
    """`asyncio.timeout` and anyio's `fail_after`, in the middle of a wait inside SQLite."""
    put(document(*((key, "confirmed", "a") for key in KEYS)), snapshot_path(database))
    settings = Settings(database=database)
    patience = random.Random(seed).uniform(0.01, 0.3)

    async def native_timeout() -> None:
        async with asyncio.timeout(patience):
            await persist_once(settings)

    async def scope_timeout() -> None:
        with anyio.fail_after(patience):
            await persist_once(settings)

    with locked(database) as release:
        for host in (native_timeout, scope_timeout):
            with pytest.raises(TimeoutError):
                asyncio.run(host())
        release()
    check()


@pytest.mark.system
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_in_asyncio_run(tmp_path: Path, presses: int) -> None:
    database = make_database(tmp_path / "m.db", [("nodes", "aa", 0, None)])
    script = f"""if True:
        import asyncio, signal
        from mbcap_watch import Settings, run
        # What was started in the background by a shell ignores it, and so do its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        settings = Settings({str(database)!r}, poll_interval=0.01)
        def started(_):
            print("started", flush=True)
        try:
            asyncio.run(run(settings, on_result=started))
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    with (
        locked(database),
        subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "error", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        put(document(("aa", "confirmed", "a")), snapshot_path(database))
        for _ in range(presses):
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    assert "interrupted" in out or process.returncode == -signal.SIGINT
    assert presses == 2 or but_for_slowness(err) == ""
    with connect(database, timeout=0) as connection:
        connection.execute("BEGIN IMMEDIATE")


def test_the_host_stalls_its_loop_and_the_lock_is_free_all_the_same(tmp_path: Path) -> None:
    """BEGIN, rows and COMMIT are one call: no lock is held across the host's loop."""
    keys = [f"{number:06}" for number in range(5000)]
    database = make_database(tmp_path / "m.db", [("nodes", key, 0, None) for key in keys])
    put(document(*((key, "confirmed", "a") for key in keys)), snapshot_path(database))

    async def stall(done: asyncio.Event) -> None:
        # With the lock held across the loop, this would be the end: the lock would never be free.
        with connect(database, timeout=DEADLINE) as connection:
            while not done.is_set():
                # The loop stands still here, whatever the bridge was doing.
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
                await asyncio.sleep(0)

    async def main() -> PersistResult:
        done = asyncio.Event()
        task = asyncio.create_task(stall(done))
        result = await persist_once(Settings(database=database, batch_rows=100))
        done.set()
        await task
        return result

    assert asyncio.run(main()).changed_active == len(keys)
