"""Cancellation at every point where the loop can take a turn, of every kind.

Afterwards: no open transaction, no lock, no thread, no descriptor, and the loop closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import aiosqlite
import anyio
import pytest

from mbcap_watch import PersistResult, Settings, persist_once, run, snapshot_path, watch
from support import (
    DEADLINE,
    at_rest,
    but_for_slowness,
    connect,
    document,
    locked,
    make_database,
    open_descriptors,
    other_process,
    put,
    read_line,
    read_rows,
    thread_names,
    threads_beside,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextvars import Context
    from pathlib import Path

KEYS = [f"{number:04}" for number in range(60)]
VALUES = (("confirmed", "a"), ("suspected", "b"))


class CountingLoop(asyncio.SelectorEventLoop):
    """A loop that strikes after a given number of callbacks: every resumption of a task is one."""

    count = 0
    strike_at = -1
    strike: Callable[[], object]

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        self._tick()
        return super().call_soon(callback, *args, context=context)

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        self._tick()
        return super().call_soon_threadsafe(callback, *args, context=context)

    def _tick(self) -> None:
        self.count += 1
        if self.count == self.strike_at:
            # Threadsafe: the tick may come from a thread of the work.
            super().call_soon_threadsafe(self.strike)


Kind: TypeAlias = "Callable[[asyncio.Task[None], anyio.CancelScope], object]"


def native(main: asyncio.Task[None], _: anyio.CancelScope) -> None:
    main.cancel()


def again_and_again(main: asyncio.Task[None], _: anyio.CancelScope) -> None:
    for delay in (0, 0.001, 0.002):
        main.get_loop().call_later(delay, main.cancel)


def by_scope(_: asyncio.Task[None], scope: anyio.CancelScope) -> None:
    scope.cancel()


def both(main: asyncio.Task[None], scope: anyio.CancelScope) -> None:
    scope.cancel()
    main.cancel()


def everything(main: asyncio.Task[None], _: anyio.CancelScope) -> None:
    """As `asyncio.run` does at the end, and after a second Ctrl-C."""
    for task in asyncio.all_tasks(main.get_loop()):
        task.cancel()


KINDS = [native, again_and_again, by_scope, both, everything]


def strike(
    work: Callable[[], Coroutine[Any, Any, object]],
    kind: Kind,
    at: int,
) -> int:
    """Run `work` and cancel it when the loop has taken `at` turns; return the turns it took."""
    loop = CountingLoop()

    async def main() -> None:
        with anyio.CancelScope() as scope:
            task = asyncio.current_task()
            assert task is not None
            loop.strike = lambda: task.done() or kind(task, scope)
            loop.count, loop.strike_at = 0, at
            await work()

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        with contextlib.suppress(asyncio.CancelledError):
            runner.run(main())
        return loop.count


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


@pytest.mark.parametrize("kind", KINDS)
def test_persist_once_is_cancelled_at_every_turn(
    database: Path, check: Callable[[], None], kind: Kind
) -> None:
    settings = Settings(database=database, batch_rows=20)
    versions = [
        [(key, "confirmed", "a") for key in KEYS],
        [(key, "suspected", "b") for key in KEYS],
    ]
    put(document(*versions[0]), snapshot_path(database))
    turns = strike(lambda: persist_once(settings), native, -1)
    assert turns >= 3
    for at in range(1, turns + 5):
        put(document(*versions[at % 2]), snapshot_path(database))
        strike(lambda: persist_once(settings), kind, at)
        check()
    strike(lambda: persist_once(settings), native, -1)
    assert {row[3] for row in read_rows(database)} == {versions[at % 2][0][2]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_persist_once_is_cancelled_at_any_moment(
    database: Path, check: Callable[[], None], kind: Kind
) -> None:
    """In the midst of reading, comparing and writing, which are not turns of this loop."""
    settings = Settings(database=database, batch_rows=1)
    versions = [document(*((k, s, e) for k in KEYS)) for s, e in VALUES]
    moment = random.Random(7)
    for number in range(60):
        put(versions[number % 2], snapshot_path(database))

        async def main() -> None:
            with anyio.CancelScope() as scope:
                task = asyncio.current_task()
                assert task is not None
                asyncio.get_running_loop().call_later(moment.uniform(0, 0.02), kind, task, scope)
                await persist_once(settings)

        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(main())
        check()


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


@pytest.mark.parametrize("kind", KINDS)
def test_persist_once_is_cancelled_between_two_batches(
    database: Path, check: Callable[[], None], kind: Kind
) -> None:
    keys = [f"{number:04}" for number in range(1000)]
    with connect(database) as connection:
        connection.executemany("INSERT OR IGNORE INTO nodes (public_key) VALUES (?)", zip(keys))
    settings = Settings(database=database, batch_rows=1)
    put(document(*((key, "confirmed", "a") for key in keys)), snapshot_path(database))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with anyio.CancelScope() as scope:
            task = asyncio.current_task()
            assert task is not None

            left = threading.Event()

            def strike_between_two_batches() -> None:
                with connect(database, timeout=0) as neighbour:
                    lock_between_two_batches(neighbour)
                    loop.call_soon_threadsafe(kind, task, scope)
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["inotify", "poll"])
def test_run_is_cancelled_at_every_turn(
    database: Path, check: Callable[[], None], kind: Kind, mode: str
) -> None:
    settings = Settings.from_mapping(
        {"database": database, "mode": mode, "poll_interval": 0.01, "batch_rows": 20}
    )
    versions = [
        document(*((k, s, e) for k in KEYS)) for s, e in (("confirmed", "a"), ("suspected", "b"))
    ]
    for at in range(1, 40, 3 if mode == "inotify" else 1):
        put(versions[at % 2], snapshot_path(database))

        def publish_again(_: PersistResult, number: int = at) -> None:
            put(versions[(number + 1) % 2], snapshot_path(database))

        async def work(hook: Any = publish_again) -> None:
            with anyio.move_on_after(0.2):  # for when the loop does not take so many turns
                await run(settings, on_result=hook)

        strike(work, kind, at)
        check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bridge_on_the_hosts_connection_is_cancelled_at_every_turn(
    database: Path, kind: Kind
) -> None:
    """Its lock is free then, no task uses it, no cursor pins the WAL, and it can go on."""
    connection = asyncio.run(opened(database))
    settings = Settings(database, batch_rows=20)
    versions = [document(*((key, status, text) for key in KEYS)) for status, text in VALUES]
    threads = Counter(thread_names())
    left, ended = list[asyncio.Task[Any]](), list[int]()

    async def work(lock: asyncio.Lock) -> None:
        try:
            # Not a task group of anyio: that hangs if the host cancels all tasks while one starts.
            async with watch(settings, connection=connection, lock=lock):
                pass
            ended.append(at)
        finally:
            left.extend(task for task in asyncio.all_tasks() if "HostAccess" in repr(task))

    moments = range(1, 120, 3)
    for at in (*moments, -1):
        put(versions[at % 2], snapshot_path(database))
        lock = asyncio.Lock()
        strike(partial(work, lock), kind, at)
        assert not left
        assert not lock.locked()
        wait_until(lambda: Counter(thread_names()) <= threads, "an end of the bridge's threads")
        assert not connection.in_transaction
        with connect(database, timeout=0) as other:
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
            busy, *_ = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            assert not busy, "a cursor is open"
    assert ended[-1] == -1
    assert len(ended) < len(moments) - 5
    asyncio.run(connection.close())
    assert {row[2:] for row in read_rows(database)} == {(1, "b")}


async def opened(database: Path) -> aiosqlite.Connection:
    return await aiosqlite.connect(database, isolation_level=None)


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


# ------------------------------------------------------------------------------ SIGKILL

KILLS = int(os.environ.get("MBCAP_TEST_KILLS", "100"))

ZYGOTE = """
    import asyncio, os, sys, time
    from mbcap_watch import Settings, persist_once
    import mbcap_watch.bridge.run
    from mbcap_watch.snapshot.files import snapshot_path
    database, first, second = sys.argv[1:]
    settings = Settings(database, batch_rows=20)
    versions = [open(first, "rb").read(), open(second, "rb").read()]
    async def work():
        number = 0
        while True:
            started = time.monotonic()
            path = snapshot_path(database)
            with open(str(path) + ".tmp", "wb") as file:
                file.write(versions[number % 2])
            os.replace(str(path) + ".tmp", path)
            await persist_once(settings)
            number += 1
            if number == 1:
                print(time.monotonic() - started, flush=True)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            sys.stdin.close()
            print(os.getpid(), flush=True)
            asyncio.run(work())
        os.waitpid(child, 0)
        print("dead", flush=True)
"""


@pytest.mark.slow
@pytest.mark.system
def test_sigkill_at_any_moment(tmp_path: Path) -> None:
    """Whatever was committed is right, the database is sound, and the next look completes it."""
    keys = [f"{number:064x}" for number in range(500)]
    database = make_database(
        tmp_path / "m.db",
        [("nodes" if n % 3 else "inactive_nodes", key, 0, None) for n, key in enumerate(keys)],
    )
    files = []
    for name, status in (("a", "confirmed"), ("b", "suspected")):
        files.append(str(tmp_path / name))
        (tmp_path / name).write_bytes(document(*((key, status, name) for key in keys)))
    (tmp_path / "mbcap-snapshot").mkdir()
    moment = random.Random(1)
    with other_process(ZYGOTE, str(database), *files) as zygote:
        assert zygote.stdin is not None
        for number in range(KILLS):
            zygote.stdin.write("\n")
            zygote.stdin.flush()
            child = int(read_line(zygote))
            seconds = float(read_line(zygote))
            # All rows are equal now; the syncs that follow are as long as the first one was.
            with connect(database, timeout=0) as neighbour:
                if number % 5:
                    time.sleep(moment.uniform(0, seconds))
                    os.kill(child, signal.SIGKILL)
                else:
                    lock_between_two_batches(neighbour)
                    os.kill(child, signal.SIGKILL)
                    neighbour.execute("ROLLBACK")
            assert read_line(zygote) == "dead"

            with connect(database) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                assert values(connection) <= {(0, None), (2, "a"), (1, "b")}

    put((tmp_path / "a").read_bytes(), snapshot_path(database))
    result = asyncio.run(persist_once(Settings(database=database)))
    assert result.outcome in ("applied", "unchanged")
    assert {row[2:] for row in read_rows(database)} == {(2, "a")}


def test_sqlite_is_recent_enough() -> None:
    assert sqlite3.sqlite_version_info >= (3, 34)
