"""What several tests need: databases as CoreScope makes them, waiting, other processes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from machine import NOBODY
from mbcap_watch import PersistResult, Settings, Trigger, persist_once, run, snapshot_path
from mbcap_watch.doctor.findings import Installation
from mbcap_watch.doctor.health import explain
from mbcap_watch.store import descriptors
from mbcap_watch.telemetry.ask import ROOT
from mbcap_watch.telemetry.control import ControlSocket
from mbcap_watch.telemetry.logs import ResultLog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from mbcap_watch import Timings, WatchState
    from mbcap_watch.results import Outcome
    from mbcap_watch.telemetry.stats import Stats

TESTS = Path(__file__).parent

# Connections of a host, by the options of aiosqlite.connect.
each_kind_of_connection = pytest.mark.parametrize(
    "options",
    [
        {},
        {"isolation_level": None},
        {"isolation_level": "IMMEDIATE"},
        pytest.param(
            {"autocommit": True},
            marks=pytest.mark.skipif(sys.version_info < (3, 12), reason="new in 3.12"),
        ),
    ],
    ids=str,
)
DEADLINE = 60.0  # generous: the machines are slow and shared

Row = tuple[str, str, int, str | None]
"""`(table, public_key, multibyte_sup, multibyte_evidence)`"""

_SCHEMA = """
CREATE TABLE {table} (public_key TEXT PRIMARY KEY, name TEXT, last_seen TEXT,
  multibyte_sup INTEGER NOT NULL DEFAULT 0, multibyte_evidence TEXT)
"""


@contextlib.contextmanager
def connect(database: Path | str, **options: Any) -> Iterator[sqlite3.Connection]:
    """Open a connection of another program: autocommit, and closed at the end.

    As the ingestor, it empties the -wal that it has filled. Closing does so only where nobody else
    has the database open, and a bridge may at this moment: it would find a -wal left behind.
    """
    connection = sqlite3.connect(database, isolation_level=None, **options)
    with contextlib.closing(connection):
        yield connection
        if connection.total_changes:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def make_database(path: Path, rows: Iterable[Row] = (), *, journal_mode: str = "wal") -> Path:
    with connect(path) as connection:
        connection.execute(f"PRAGMA journal_mode = {journal_mode}")
        for table in ("nodes", "inactive_nodes"):
            connection.execute(_SCHEMA.format(table=table))
        connection.execute("BEGIN")
        for table, *values in rows:
            connection.execute(
                f"INSERT INTO {table} (public_key, multibyte_sup, multibyte_evidence)"
                " VALUES (?, ?, ?)",
                values,
            )
        connection.execute("COMMIT")
    return path


def read_rows(database: Path) -> set[Row]:
    """Return the rows of every table that has the columns."""
    rows: set[Row] = set()
    with connect(database) as connection:
        for table in ("nodes", "inactive_nodes"):
            columns = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
            if {"multibyte_sup", "multibyte_evidence"} <= columns:
                rows.update(
                    (table, *row)
                    for row in connection.execute(
                        f"SELECT public_key, multibyte_sup, multibyte_evidence FROM {table}"
                    )
                )
    return rows


def document(*entries: tuple[str, str] | tuple[str, str, str], written_at: str = "") -> bytes:
    """Return the bytes of a snapshot as a publisher in another language might write them."""
    names = ("public_key", "status", "evidence")
    body: dict[str, Any] = {"entries": [dict(zip(names, e, strict=False)) for e in entries]}
    if written_at:
        body["writtenAt"] = written_at
    return json.dumps(body).encode()


def run_sql(database: Path, *statements: str) -> None:
    with connect(database) as connection:
        for statement in statements:
            connection.execute(statement)


def rename_from_another_process(data: bytes, target: Path) -> None:
    """Replace `target` as the server does: fill a temporary file, rename it, elsewhere."""
    script = "import os,sys; p=sys.argv[1]; open(p+'.tmp','wb').write(sys.stdin.buffer.read())"
    script += "; os.replace(p+'.tmp', p)"
    subprocess.run([sys.executable, "-c", script, str(target)], input=data, check=True)


def put(data: bytes, target: Path) -> None:
    """Replace `target` by rename, from this process."""
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, target)


@contextlib.contextmanager
def other_process(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python code in another process; it is killed at the end if it still runs."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


NOISE = 2 << 20  # what the interpreter takes meanwhile

# A sync that ends where the database is found missing: after the values that are wanted. `/proc`
# tells the peak of this process alone; getrusage would include that of its parent.
_READ = """
import json, sys
from pathlib import Path
import anyio
from mbcap_watch import Settings, persist_once

def peak():
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024

directory = Path(sys.argv[1])
database = directory / "missing.db"
anyio.run(persist_once, Settings(database, snapshot_dir=directory / "nowhere"))
Path("/proc/self/clear_refs").write_text("5")
before = peak()
result = anyio.run(persist_once, Settings(database, snapshot_dir=directory))
print(json.dumps([peak() - before, result.to_dict()]))
"""


def cost_of_reading(directory: Path) -> tuple[int, dict[str, Any]]:
    """Return what the snapshot in a directory takes in memory, and the result of a sync with it."""
    command = [sys.executable, "-c", _READ, str(directory)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=DEADLINE)
    growth, result = json.loads(done.stdout)
    return growth, result


TIMES = 1_000


def blocks_kept(call: Callable[[], object]) -> int:
    """Return how many blocks of memory stay behind when this was called 1,000 times.

    CPython before 3.14 keeps each tuple that it has cut to its length when it is done with it:
    those of `tuple(map(…))` and of dataclasses.fields(), 2,000 of a length. A list has a length.
    """
    gc.collect()  # of those that are kept, none is left
    before = sys.getallocatedblocks()
    for _ in range(TIMES):
        call()
    return sys.getallocatedblocks() - before


@contextlib.contextmanager
def planted(path: Path, answer: bytes) -> Iterator[int]:
    """Have another user offer a socket that says what root would like to hear."""
    path.parent.mkdir(exist_ok=True)
    path.parent.chmod(0o777)
    script = f"""
        import os, socket, sys
        os.setgid({NOBODY}), os.setuid({NOBODY})
        server = socket.socket(socket.AF_UNIX)
        server.bind(sys.argv[1])
        os.chmod(sys.argv[1], 0o666)
        server.listen()
        print("planted", flush=True)
        held = []
        while True:
            client = server.accept()[0]
            client.sendall(sys.argv[2].encode())
            client.close() if sys.argv[2] else held.append(client)
    """
    with other_process(script, f"{path}", answer.decode()) as process:
        assert read_line(process) == "planted"
        yield process.pid


IN_USE = """
    import sqlite3, sys
    connection = sqlite3.connect(sys.argv[1], isolation_level=None)
    connection.execute("UPDATE nodes SET name = 'written'")
    print("open", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def in_use(database: Path, script: str = IN_USE) -> Iterator[subprocess.Popen[str]]:
    """Have another process keep the database open, with rows in its `-wal`."""
    with other_process(script, str(database)) as process:
        assert read_line(process) == "open"
        yield process


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


@contextlib.contextmanager
def locked(database: Path) -> Iterator[Callable[[], None]]:
    """Have another process hold the write lock; yields what releases it."""
    script = """
        import sqlite3, sys
        connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
        connection.execute("BEGIN IMMEDIATE")
        print("locked", flush=True)
        sys.stdin.readline()
        connection.execute("ROLLBACK")
        connection.close()
        print("released", flush=True)
    """
    with other_process(script, str(database)) as process:
        assert read_line(process) == "locked"

        def release() -> None:
            if process.poll() is None and process.stdin is not None:
                process.stdin.write("\n")
                process.stdin.flush()
                assert read_line(process) == "released"

        yield release


def interrupted_as_usual() -> None:
    """Have SIGINT interrupt this process and its children.

    What a shell starts in the background ignores it, and so would they.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def but_for_slowness(text: str) -> str:
    """Leave out what asyncio's development mode says of a callback that took long."""
    return re.sub(r"^Executing <.* took .* seconds\n", "", text, flags=re.MULTILINE)


def wait_until(condition: Callable[[], object], what: str = "the condition") -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {DEADLINE} s"
        time.sleep(0.005)


async def until(condition: Callable[[], object], what: str = "the condition") -> None:
    """As `wait_until`, without stopping the event loop."""
    with anyio.move_on_after(DEADLINE):
        while not condition():
            await anyio.sleep(0.005)
        return
    raise AssertionError(f"{what} did not come within {DEADLINE} s")


def has_landed(database: Path, evidence: str) -> bool:
    """Whether a snapshot that confirms `aa11` was applied."""
    return ("nodes", "aa11", 2, evidence) in read_rows(database)


async def landed(database: Path, evidence: str) -> None:
    await until(partial(has_landed, database, evidence), f"{evidence!r} in the database")


def open_descriptors(pid: int | str = "self") -> dict[str, str]:
    """Return what a process has open; of this one, not what is kept to ask for locks with."""
    found = {}
    kept = (
        {str(descriptor) for descriptor, _ in descriptors.kept.values()} if pid == "self" else set()
    )
    for name in set(os.listdir(f"/proc/{pid}/fd")) - kept:
        with contextlib.suppress(FileNotFoundError):
            found[name] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


_close = os.close


def close_as_a_server_that_is_gone(descriptor: int) -> None:
    """Close as the kernel does on a FUSE or network filesystem: it is closed, and EIO is told."""
    _close(descriptor)
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def has_open(database: Path, pid: int | str = "self") -> bool:
    """Whether a process has the database open: a bridge has, while it compares, writes or waits."""
    return str(database) in open_descriptors(pid).values()


def thread_names() -> list[str]:
    names = (thread.name for thread in threading.enumerate())
    return sorted(name for name in names if not name.startswith("Trio thread"))  # kept for 10 s


def threads_beside(known: list[str]) -> Counter[str]:
    """Return the threads that are more than those that are known."""
    return Counter(thread_names()) - Counter(known)


def at_rest() -> list[str]:
    """Return the names of the threads once no connection of an earlier test is left."""
    wait_until(lambda: not any("_connection_worker_thread" in name for name in thread_names()))
    return thread_names()


def result(outcome: Outcome = "applied", error: str | None = None, **fields: Any) -> PersistResult:
    """Make a result, as a sync after a rename has it."""
    return PersistResult(**{"outcome": outcome, "reason": "rename", "error": error, **fields})


def result_log(clock: Callable[[], float] = time.monotonic) -> ResultLog:
    """Return a log of results, as the daemon has it."""
    here = Installation("/data/meshcore.db", "/data/mbcap-snapshot", "")
    return ResultLog(lambda result: explain(result, here), clock)


class Results:
    """What a bridge tells: every result, state and timing; and `trigger`, to ask it for a sync."""

    def __init__(self) -> None:
        self.all: list[PersistResult] = []
        self.states: list[WatchState] = []
        self.timings: list[Timings] = []
        self.trigger = Trigger()

    def __call__(self, result: PersistResult) -> None:
        self.all.append(result)

    @property
    def outcomes(self) -> list[str]:
        return [result.outcome for result in self.all]

    @property
    def state(self) -> WatchState:
        return self.states[-1]

    async def next(self, outcome: str, *, after: int = 0) -> PersistResult:
        """Wait for the first result with `outcome` from number `after` on."""
        await until(lambda: outcome in self.outcomes[after:], f"outcome {outcome}")
        return self.all[self.outcomes.index(outcome, after)]

    async def sync(self) -> PersistResult:
        """Ask for a sync; return the next result."""
        known = len(self.all)
        self.trigger.sync_now()
        await until(lambda: len(self.all) > known, "a result")
        return self.all[known]

    async def syncs(self, number: int) -> None:
        """Wait for the end of more syncs than that, those that had nothing to tell included."""
        known = len(self.states)
        await until(lambda: len(self.states) > known + number, "syncs")

    async def count(self, outcome: str, number: int) -> None:
        """Wait until `outcome` was reported `number` times."""
        await until(lambda: self.outcomes.count(outcome) >= number, f"{number} times {outcome}")


@contextlib.contextmanager
def offered(
    settings: Settings, environ: dict[str, str], sample: Callable[[], Stats], root: Path = ROOT
) -> Iterator[ControlSocket]:
    """Offer stats on a control socket, from a loop in a thread, without a bridge."""
    control = ControlSocket(settings, environ, sample, root)

    async def serve() -> None:
        with control:
            status.set()
            await anyio.sleep_forever()

    status = threading.Event()
    loop = asyncio.new_event_loop()
    task = loop.create_task(serve())

    def turn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    thread = threading.Thread(target=turn)
    thread.start()
    try:
        assert status.wait(DEADLINE)
        yield control
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


async def apply(database: Path, *entries: tuple[str, ...], **settings: Any) -> PersistResult:
    """Publish a snapshot, and sync once."""
    put(document(*entries), snapshot_path(database))  # type: ignore[arg-type]
    return await persist_once(Settings(database=database, **settings))


class Clock:
    """Monotonic seconds that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


OFF = "24h"
QUIET = {"sweep_interval": OFF, "resync": OFF, "poll_interval": OFF}


def quiet(database: Path, **settings: Any) -> Settings:
    """Return settings with every clock switched off but those that are given."""
    return Settings.from_mapping({"database": database, **QUIET, **settings})


@contextlib.asynccontextmanager
async def bridge(database: Path, **settings: Any) -> AsyncIterator[Results]:
    """Run a bridge with `quiet` settings."""
    results = Results()
    made = quiet(database, **settings)
    async with anyio.create_task_group() as group:
        hooked = partial(run, made, on_result=results, on_state=results.states.append)
        await group.start(
            partial(hooked, on_timings=results.timings.append, trigger=results.trigger)
        )
        yield results
        group.cancel_scope.cancel()
