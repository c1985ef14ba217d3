"""SIGKILL at any moment beside a busy writer: nothing is torn or lost, the next process goes on.

After each kill the judge (`published`) reads the rows with plain sqlite3. A round fails if a value
is in no snapshot, if the database is not sound, if a new process does not finish the work, or if a
row of the writer is missing. The victims are forked from one process that has loaded everything,
so that ten thousand of them take an hour.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from campaigns.campaign import Campaign
from campaigns.published import Published
from support import DEADLINE, connect, other_process, read_line

if TYPE_CHECKING:
    import sqlite3
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

ZYGOTE = """
    import asyncio, os, sys
    import anyio._backends._asyncio
    from mbcap_watch import Settings, persist_once, run
    import mbcap_watch.bridge.sync, mbcap_watch.watcher.supervisor
    settings = Settings(sys.argv[1], batch_rows=int(sys.argv[2]), debounce=0)
    async def again_and_again():
        while True:
            await persist_once(settings)
    async def once():
        print((await persist_once(settings)).outcome, flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            sys.stdin.close()
            print(os.getpid(), flush=True)
            work = line.strip()
            asyncio.run(run(settings) if work == "run" else globals()[work]())
            os._exit(0)
        os.waitpid(child, 0)
        print("ended", flush=True)
"""

# It writes what CoreScope's ingestor writes: packets, other columns, and nodes of its own. What it
# counts at the end has to be there.
WRITER = """
    import random, select, sqlite3, sys, time
    database, seed, timeout = sys.argv[1:]
    dice, packets, adverts, slowest = random.Random(int(seed)), 0, 0, 0.0
    connection = sqlite3.connect(database, isolation_level=None, timeout=float(timeout))
    keys = [key for key, in connection.execute("SELECT public_key FROM nodes")]
    connection.execute("CREATE TABLE packets (id INTEGER PRIMARY KEY, payload TEXT)")
    connection.execute("ALTER TABLE nodes ADD COLUMN adverts INTEGER NOT NULL DEFAULT 0")
    print("ready", flush=True)
    try:
        while not select.select([sys.stdin], [], [], dice.choice([0, 0.002, 0.01]))[0]:
            started = time.monotonic()
            connection.execute("BEGIN IMMEDIATE")
            for _ in range(dice.choice([1, 1, 5])):
                connection.execute("INSERT INTO packets (payload) VALUES (?)", ("p" * 200,))
                packets += 1
            connection.execute(
                "UPDATE nodes SET adverts = adverts + 1, last_seen = ? WHERE public_key = ?",
                (str(packets), dice.choice(keys)),
            )
            adverts += 1
            own = f"of the writer {dice.randrange(20)}"
            if dice.random() < 0.5:
                connection.execute("DELETE FROM nodes WHERE public_key = ?", (own,))
            else:
                connection.execute("INSERT OR IGNORE INTO nodes (public_key) VALUES (?)", (own,))
            connection.execute("COMMIT")
            slowest = max(slowest, time.monotonic() - started)
    except sqlite3.Error as exc:
        print("failed:", repr(exc), time.monotonic() - started, flush=True)
        sys.exit()
    print(packets, adverts, slowest, flush=True)
"""

# In seconds. It is scheduled now and then only, on a machine that does much else.
WRITERS_PATIENCE = 2.0

KILLS = 100


class Zygote:
    """Forks victims, one at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, work: str) -> int:
        """Start a victim; return its pid."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{work}\n")
        self._process.stdin.flush()
        return int(read_line(self._process))

    def wait(self) -> None:
        assert read_line(self._process) == "ended"

    def converge(self) -> float:
        """Have a process sync once; return how long it took."""
        started = time.monotonic()
        self.start("once")
        outcome = read_line(self._process)
        self.wait()
        assert outcome in ("applied", "unchanged"), outcome
        return time.monotonic() - started


@contextlib.contextmanager
def busy_writer(database: Path, number: int) -> Iterator[Counter[str]]:
    """Have another process write all the time; nothing it wrote may be missing afterwards."""
    tally = Counter[str]()
    with other_process(WRITER, str(database), str(number), str(WRITERS_PATIENCE)) as process:
        assert read_line(process) == "ready"
        yield tally
        assert process.stdin is not None
        process.stdin.close()
        said = read_line(process)
        assert not said.startswith("failed"), said
        packets, adverts, slowest = said.split()
    with connect(database) as connection:
        [found] = connection.execute("SELECT count(*), max(id) FROM packets")
        assert found == (int(packets), int(packets))
        [(found,)] = connection.execute("SELECT sum(adverts) FROM nodes")
        assert found == int(adverts)
    tally["transactions of the other writer"] = int(adverts)
    tally["rounds in which it waited over 100 ms"] = float(slowest) > 0.1


def strike(pid: int, published: Published, dice: random.Random, seconds: float) -> str:
    """Kill a victim at some moment; return what kind of moment it was."""
    moment, give_up = dice.random(), time.monotonic() + seconds
    if moment < 0.6:
        for pause in sorted(dice.uniform(0, seconds) for _ in range(dice.randrange(4))):
            time.sleep(max(0, give_up - seconds + pause - time.monotonic()))
            published.publish()
        time.sleep(max(0, give_up - time.monotonic()))
        os.kill(pid, signal.SIGKILL)
        return "at any moment"
    published.publish()
    give_up += 10 * seconds
    while not (mixed := published.is_mixed()) and time.monotonic() < give_up:
        pass
    if moment < 0.8 or not mixed:
        os.kill(pid, signal.SIGKILL)
        return "between two batches" if mixed else "at any moment"
    with connect(published.database, timeout=DEADLINE) as neighbour:
        neighbour.execute("BEGIN IMMEDIATE")
        time.sleep(dice.uniform(0, 0.005))
        os.kill(pid, signal.SIGKILL)
        neighbour.execute("ROLLBACK")
    return "while the lock was held"


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    dice = random.Random(number)
    nodes, batches = dice.choice([50, 200, 500]), dice.choice([2, 5, 20])
    published = Published(base / "m.db", nodes, dice)
    published.publish()
    arguments = [str(published.database), str(nodes // batches)]
    with (
        busy_writer(published.database, number) as tally,
        other_process(ZYGOTE, *arguments) as process,
    ):
        zygote = Zygote(process)
        # A victim lives for as long as a few syncs take; the quickest one is not held up by others.
        seconds = min(zygote.converge() for _ in range(3))
        for _ in range(min(wanted, KILLS)):
            work = dice.choice(["run", "again_and_again"])
            published.publish()
            victim = zygote.start(work)
            moment = strike(victim, published, dice, dice.uniform(0, 4 * seconds))
            zygote.wait()
            tally.update(["kills", moment, work])
            with connect(published.database) as connection:
                require_sound(connection, dice)
                latest = published.judge(connection)
            tally["snapshots written in part"] += 0 < latest < 1
            seconds = min(seconds, zygote.converge())
            with connect(published.database) as connection:
                published.require_latest(connection)
    return tally


def require_sound(connection: sqlite3.Connection, dice: random.Random) -> None:
    check = "integrity_check" if dice.random() < 0.1 else "quick_check"
    found: list[Any] = connection.execute(f"PRAGMA {check}").fetchall()
    assert found == [("ok",)], found


CAMPAIGN = Campaign(
    about="SIGKILL at any moment beside a busy writer: the database is sound, the writer loses"
    " nothing, a fresh process converges",
    unit="kills",
    full=10_000,
    short=12,
    play=play,
)
