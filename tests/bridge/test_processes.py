"""Hosts that start processes while a bridge runs: by fork, by spawn, and anew in their place."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from subprocess import PIPE

import pytest

from mbcap_watch import Entry, Snapshot, write_snapshot
from mbcap_watch.store import descriptors
from mbcap_watch.store.reader import open_to_read
from mbcap_watch.store.wal import require_own_wal
from support import DEADLINE, connect, make_database, other_process, read_line, read_rows

pytestmark = pytest.mark.system

# Every program is a host with a bridge; `step(text)` publishes and waits until just that landed.
PREAMBLE = """
    import asyncio, multiprocessing, os, sys
    import aiosqlite
    from mbcap_watch import Entry, Settings, Snapshot, persist_once, watch, write_snapshot

    database, way = sys.argv[1:3]
    settings = Settings(database, sweep_interval="24h")

    def publish(text):
        return write_snapshot(database, Snapshot((Entry("aa11", "confirmed", text),)))

    async def step(results, text):
        published, landed = publish(text), ("applied", "unchanged")
        async for result in results:
            assert result.outcome in (*landed, "busy"), result  # of a child that is closing
            if result.outcome in landed and result.written_at == published.written_at:
                return

    def leave(child):
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    async def bridged(work):
        if way == "own":
            async with watch(settings) as results:
                await work(results)
        else:
            async with aiosqlite.connect(database, isolation_level=None) as connection:
                lock = asyncio.Lock()
                async with watch(settings, connection=connection, lock=lock) as results:
                    await work(results)
"""

FORKED = """
    async def work(results):
        await step(results, "before")
        for moment in range(20):
            publish(str(moment))  # the bridge may be doing anything
            await asyncio.sleep(moment / 5000)
            child = os.fork()
            if child == 0:
                try:
                    # As a child that leaves what it was given: the contexts, and the descriptors.
                    leaving = results_context.__aexit__(None, None, None)
                    try:
                        leaving.send(None)  # would wait for the end of the parent's thread
                    except StopIteration:
                        os.closerange(3, 100)
                        os._exit(0)
                finally:
                    os._exit(1)
            leave(child)
        await step(results, "after")

    async def main():
        global results_context
        options = {}
        connection = await aiosqlite.connect(database, isolation_level=None)
        if way != "own":
            options = {"connection": connection, "lock": asyncio.Lock()}
        results_context = watch(settings, **options)
        results = await results_context.__aenter__()
        await work(results)
        await results_context.__aexit__(None, None, None)
        await connection.close()

    asyncio.run(main())
    print("done")
"""

FORKED_WITH_ITS_OWN = """
    async def once():
        async with watch(settings):
            pass
        return await persist_once(settings)

    async def work(results):
        await step(results, "before")
        for moment in range(10):
            # In the midst of a sync, SQLite in the child would go by locks that the parent has.
            await step(results, str(moment))
            child = os.fork()
            if child == 0:
                try:
                    result = asyncio.run(once())
                    os._exit(0 if result.outcome in ("applied", "unchanged") else 2)
                finally:
                    os._exit(1)
            # The parent's loop goes on: the child's connection waits for that of nobody.
            while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
                await asyncio.sleep(0.01)
            assert ended[1] == 0, ended
        await step(results, "after")

    asyncio.run(bridged(work))
    print("done")
"""

SPAWNED = """
    def child(settings):
        async def sync():
            async with watch(settings) as results:
                return (await anext(results)).outcome
        assert asyncio.run(sync()) in ("applied", "unchanged")

    async def work(results):
        await step(results, "before")
        process = multiprocessing.get_context("spawn").Process(target=child, args=(settings,))
        process.start()
        while process.is_alive():
            await asyncio.sleep(0.01)
        assert process.exitcode == 0, process.exitcode
        await step(results, "after")

    if __name__ == "__main__":
        asyncio.run(bridged(work))
        print("done")
"""

RESTARTED = """
    async def work(results):
        await step(results, "before" if len(sys.argv) == 3 else "after")
        if len(sys.argv) == 3:  # in the midst of everything, as a server does that reloads itself
            os.execv(sys.executable, [sys.executable, *sys.argv, "again"])

    asyncio.run(bridged(work))
    print("done")
"""


@pytest.mark.parametrize("way", ["own", "host"])
@pytest.mark.parametrize(
    "program",
    [FORKED, FORKED_WITH_ITS_OWN, SPAWNED, RESTARTED],
    ids=["forked", "forked, with a bridge of its own", "spawned", "restarted"],
)
def test_the_bridge_goes_on(tmp_path: Path, way: str, program: str) -> None:
    database = make_database(tmp_path / "meshcore.db", [("nodes", "aa11", 0, None)])
    write_snapshot(database, Snapshot((Entry("bb22", "confirmed"),)))
    script = tmp_path / "host.py"  # spawn imports it
    with script.open("w") as file:
        file.write(textwrap.dedent(PREAMBLE) + textwrap.dedent(program))
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(script), str(database), way]
    with subprocess.Popen(
        command, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True
    ) as host:
        try:
            assert host.communicate(timeout=DEADLINE) == ("done\n", "")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(host.pid, signal.SIGKILL)  # its children as well
    assert read_rows(database) == {("nodes", "aa11", 2, "after")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside other threads
def test_a_child_does_not_inherit_that_a_database_is_being_opened(tmp_path: Path) -> None:
    with descriptors.opening_lock(tmp_path):
        if (child := os.fork()) == 0:
            os._exit(0 if descriptors.opening_lock(tmp_path).acquire(blocking=False) else 1)
        assert os.waitpid(child, 0) == (child, 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as above
def test_a_child_that_closes_all_descriptors_keeps_its_own(tmp_path: Path) -> None:
    """As one that becomes a daemon. A number that the parent had kept may be its connection's."""
    database = make_database(tmp_path / "m.db", [("nodes", "aa11", 0, None)])
    with connect(database) as connection:
        connection.execute("UPDATE nodes SET name = 'in the wal'")
        require_own_wal(database, 60.0)
        descriptors.release(database)  # in vain: the host has it open
    number, _ = descriptors.kept[descriptors.identity_of(str(database)) or (0, 0)]
    if (child := os.fork()) == 0:
        try:
            os.closerange(3, 256)
            while os.open(os.devnull, os.O_RDONLY) < number - 1:
                pass
            with connect(database) as connection:
                assert os.readlink(f"/proc/self/fd/{number}") == str(database)
                descriptors.release(database)
                connection.execute("SELECT * FROM nodes").fetchall()
            os._exit(0)
        finally:
            os._exit(1)
    descriptors.release(database)
    assert os.waitpid(child, 0) == (child, 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as above
def test_a_fork_waits_until_no_connection_is_open(tmp_path: Path) -> None:
    """Else a connection of the child takes no lock on the database, ever."""
    database = make_database(tmp_path / "m.db", [("nodes", "aa11", 0, None)])
    opened = threading.Event()

    def look() -> None:
        with open_to_read(database, 60.0) as (connection, _):
            connection.execute("SELECT * FROM nodes").fetchall()
            opened.set()
            time.sleep(0.2)

    script = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]);"
    script += " c.execute('SELECT * FROM nodes').fetchall(); print('open', flush=True); input()"
    with other_process(script, str(database)) as process:
        assert read_line(process) == "open"  # so that a look takes locks
        thread = threading.Thread(target=look)
        thread.start()
        assert opened.wait(DEADLINE)
        if (child := os.fork()) == 0:
            with connect(database) as connection:
                connection.execute("SELECT * FROM nodes").fetchall()
                lines = Path("/proc/locks").read_text().splitlines()
                own = [line for line in lines if f" {os.getpid()} " in line]
                os._exit(0 if any(" 1073741826 " in line for line in own) else 1)
        assert os.waitpid(child, 0) == (child, 0)
        thread.join()
