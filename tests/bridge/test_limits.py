"""No thread can be started: a state that is told and waited in, as any other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from machine import ROOT
from mbcap_watch import ensure_snapshot_dir, snapshot_path
from support import DEADLINE, document, make_database, put, read_rows, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.system

VALUE = ("nodes", "aa11", 2, "")

# The limit does not bind root, and counts what a user runs anywhere: so this one runs nothing else.
# All is loaded before, because the interpreter may be out of that user's reach.
UNPRIVILEGED = 100_000 + os.getpid() % 10_000
PREPARE = f"""
import asyncio, contextlib, encodings.ascii, io, os, resource, signal, sys, threading
from functools import partial
from mbcap_watch import Settings, persist_once, run, snapshot_path, watch
from mbcap_watch.cli import app as cli
from mbcap_watch import apply_snapshot, read_snapshot
from mbcap_watch.doctor.findings import catalogue
import aiosqlite, anyio._backends._asyncio
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    cli.app(["run", "--help"])  # loads what the command line loads late
catalogue()
HARD = resource.getrlimit(resource.RLIMIT_NPROC)[1]
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid({UNPRIVILEGED}, {UNPRIVILEGED}, {UNPRIVILEGED})
    os.setresuid({UNPRIVILEGED}, {UNPRIVILEGED}, {UNPRIVILEGED})
def limit(most):
    resource.setrlimit(resource.RLIMIT_NPROC, (most, HARD))
database = sys.argv[1]
limit(0)
try:
    threading.Thread(target=int).start()
except RuntimeError:
    pass
else:
    print("there is no limit", flush=True)
    sys.exit()
"""


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A database and a snapshot for it that the unprivileged user may use."""
    directory = Path(tempfile.mkdtemp())
    database = make_database(directory / "m.db", [("nodes", "aa11", 0, None)])
    ensure_snapshot_dir(database)
    put(document(("aa11", "confirmed")), snapshot_path(database))
    if ROOT:
        for path in (directory, *directory.rglob("*")):
            os.chown(path, UNPRIVILEGED, UNPRIVILEGED)
    yield database
    shutil.rmtree(directory)


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE + textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RUNTIME_DIRECTORY": str(Path(str(arguments[0])).parent)},
    )


def told(script: str, database: Path) -> list[str]:
    """Return the lines that the script prints, which defines `main`."""
    with start(textwrap.dedent(script) + "asyncio.run(main())", database) as process:
        try:
            out, said = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
    if "there is no limit" in out:
        pytest.skip("this system does not keep RLIMIT_NPROC")
    assert (process.returncode, said) == (0, ""), said
    return out.splitlines()


def test_persist_once(reachable: Path) -> None:
    lines = told(
        """
        async def main():
            for most in (0, HARD):
                limit(most)
                result = await persist_once(Settings(database))
                print(result.outcome, result.cause, result.error)
        """,
        reachable,
    )
    assert lines[0].startswith("failed limit ")
    assert "no thread can be started" in lines[0]
    assert str(reachable) in lines[0]
    assert lines[1:] == ["applied None None"]
    assert VALUE in read_rows(reachable)


def test_run_waits_for_a_thread(reachable: Path) -> None:
    lines = told(
        """
        async def main():
            done = asyncio.Event()
            def seen(result):
                print(result.outcome, result.cause)
                if result.outcome == "applied":
                    done.set()
                else:
                    limit(HARD)
            settings = Settings(database, sweep_interval=0.05)
            task = asyncio.create_task(run(settings, on_result=seen))
            await done.wait()
            task.cancel()
            await asyncio.wait([task])
            print(threading.active_count())
        """,
        reachable,
    )
    assert lines == ["failed limit", "applied None", "1"]


def test_run_ends_while_it_waits_for_a_thread(reachable: Path) -> None:
    lines = told(
        """
        async def main():
            seen = asyncio.Event()
            settings = Settings(database, sweep_interval=0.05)
            task = asyncio.create_task(run(settings, on_result=lambda _: seen.set()))
            await seen.wait()
            task.cancel()
            await asyncio.wait([task])
            print(task.cancelled())
        """,
        reachable,
    )
    assert lines == ["True"]


def test_watch_is_entered_and_waits_for_a_thread(reachable: Path) -> None:
    lines = told(
        """
        async def main():
            async with watch(Settings(database, sweep_interval=0.05)) as results:
                async for result in results:
                    print(result.outcome, result.cause)
                    if result.outcome == "applied":
                        return
                    limit(HARD)
        """,
        reachable,
    )
    assert lines == ["failed limit", "applied None"]


def test_a_hosts_connection_needs_no_other_thread(reachable: Path) -> None:
    lines = told(
        """
        async def main():
            limit(HARD)
            async with aiosqlite.connect(database, isolation_level=None) as connection:
                limit(0)
                snapshot = read_snapshot(database)
                result = await apply_snapshot(connection, snapshot, lock=asyncio.Lock())
                print(result.outcome, result.error)
        """,
        reachable,
    )
    assert lines == ["applied None"]


def test_the_daemon_says_so_and_goes_on(reachable: Path) -> None:
    options = ["run", "--sweep-interval", "50ms", "--json", "--database", reachable]
    script = """
        sys.argv[1:2] = []
        signal.signal(signal.SIGUSR1, lambda *_: limit(HARD))
        cli.main()
    """
    with start(script, reachable, *options) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            if "there is no limit" in line:
                pytest.skip("this system does not keep RLIMIT_NPROC")
            assert '"failed"' in line, line or process.stderr.read()
            while "no thread can be started" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGUSR1)
            wait_until(lambda: VALUE in read_rows(reachable), "the snapshot")
            process.terminate()
            _, said = process.communicate(timeout=DEADLINE)
            assert process.returncode == 0
            assert "Traceback" not in said
        finally:
            process.kill()
