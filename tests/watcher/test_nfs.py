"""A real NFS mount, both ends on this machine: the whole daemon, with a database behind it.

`NFS_SERVER_DIR` is the directory on the server's disk, `NFS_CLIENT_DIR` the same through the
client. For faults, a command `nfsctl` (stop, start, hang, unhang) is used where there is one.
The times that are printed (`pytest -s`) are those in benchmarks/README.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mbcap_watch.watcher.mounts import mount_of
from support import connect, document, make_database, put

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.nfs,
    pytest.mark.system,
    pytest.mark.skipif("NFS_CLIENT_DIR" not in os.environ, reason="needs a real NFS mount"),
]

POLL = 0.2
SWEEP = 1.0
LONG = 150.0  # an NFSv4 server that was restarted has a grace period of up to 90 s
needs_faults = pytest.mark.skipif(shutil.which("nfsctl") is None, reason="needs nfsctl")


class Daemon:
    """A running daemon, its database, and both ends of its snapshot directory."""

    def __init__(self, base: Path) -> None:
        self.database = make_database(base / "m.db", [("nodes", "aa11", 0, None)])
        name = f"t{time.monotonic_ns()}"
        self.far = Path(os.environ["NFS_SERVER_DIR"]) / name
        self.near = Path(os.environ["NFS_CLIENT_DIR"]) / name
        self.far.mkdir()
        self.log = base / "log.txt"
        options = ["--database", str(self.database), "--snapshot-dir", str(self.near)]
        options += ["--poll-interval", f"{POLL}s", "--log-format", "json"]
        options += ["--sweep-interval", f"{SWEEP}s"]
        with open(self.log, "wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mbcap_watch", "run", *options], stderr=stderr
            )

    def messages(self) -> list[str]:
        return [json.loads(line)["message"] for line in self.log.read_text().splitlines()]

    def wait_for(self, message: str) -> None:
        deadline = time.monotonic() + LONG
        while not any(message in line for line in self.messages()):
            assert time.monotonic() < deadline, (message, self.messages())
            time.sleep(0.02)

    def publish(self, evidence: str) -> float:
        put(document(("aa11", "confirmed", evidence)), self.far / "snapshot.json")
        return time.monotonic()

    def landed(self, evidence: str, since: float) -> float:
        """Return the seconds from the rename on the server to the committed row."""
        with connect(self.database) as connection:
            while connection.execute("SELECT multibyte_evidence FROM nodes").fetchone() != (
                evidence,
            ):
                assert time.monotonic() < since + LONG, (evidence, self.messages())
                time.sleep(0.002)
        return time.monotonic() - since


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    running = Daemon(tmp_path)
    try:
        running.wait_for("waiting for a snapshot")
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@contextlib.contextmanager
def fault(start: str, end: str) -> Iterator[None]:
    subprocess.run(["nfsctl", start], check=True)
    try:
        yield
    finally:
        subprocess.run(["nfsctl", end], check=True)


def report(what: str, times: list[float]) -> None:
    version = [o for o in mount_of(Path(os.environ["NFS_CLIENT_DIR"])).options if "vers=" in o]
    print(  # noqa: T201 - for benchmarks/README.md
        f"\nNFS {','.join(version)}, poll {POLL} s, {what}: n={len(times)}"
        f" median {statistics.median(times):.2f} s, max {max(times):.2f} s"
    )


def test_a_rename_on_the_server_lands_within_a_poll(daemon: Daemon) -> None:
    assert any("watching by poll" in message for message in daemon.messages())
    times = []
    for number in range(40):
        time.sleep(0.13 * (number % 4))  # at another moment between two polls each time
        times.append(daemon.landed(f"{number:04}", daemon.publish(f"{number:04}")))
    report("rename to committed row", times)
    # One poll, and what the machine adds: a guest without hardware help is slow.
    assert statistics.median(times) < 2 * POLL + 0.5
    assert max(times) < POLL + 3


def test_an_old_inode_that_lives_on_hides_nothing(daemon: Daemon) -> None:
    """A process on the server that holds the old file open makes stat and open late by minutes."""
    daemon.landed("first", daemon.publish("first"))
    os.link(daemon.far / "snapshot.json", daemon.far / "kept")
    with open(daemon.far / "snapshot.json", "rb"):
        times = [daemon.landed(f"{n}", daemon.publish(f"{n}")) for n in range(10)]
    report("with the old inode alive", times)
    assert max(times) < POLL + 3


def test_a_file_that_was_missing_is_found_at_once(daemon: Daemon) -> None:
    """The client remembers for half a minute that a name was missing; a listing does not."""
    time.sleep(2)
    assert daemon.landed("here", daemon.publish("here")) < POLL + 3
    (daemon.far / "snapshot.json").unlink()
    daemon.wait_for("waiting for a snapshot")
    assert daemon.landed("again", daemon.publish("again")) < POLL + 3


def test_a_directory_that_appears_or_is_replaced_is_found_by_the_sweep(daemon: Daemon) -> None:
    """The client would believe for a minute that it is missing, or still the old one."""
    old = daemon.far.with_suffix(".old")
    daemon.landed("first", daemon.publish("first"))
    daemon.far.rename(old)
    daemon.far.mkdir()
    times = [daemon.landed("replaced", daemon.publish("replaced"))]
    shutil.rmtree(daemon.far)
    daemon.wait_for("does not exist")
    time.sleep(2)
    daemon.far.mkdir()
    times.append(daemon.landed("new", daemon.publish("new")))
    report("a directory that was replaced, or is new", times)
    assert max(times) < SWEEP + POLL + 3


@needs_faults
def test_the_server_is_stopped_and_comes_back(daemon: Daemon) -> None:
    daemon.landed("before", daemon.publish("before"))
    with fault("stop", "start"):
        time.sleep(1)
        daemon.publish("while it was away")
        daemon.wait_for("the filesystem does not answer")
    times = [daemon.landed("while it was away", time.monotonic())]
    report("after the server came back", times)
    daemon.wait_for("the filesystem answers again")
    assert daemon.landed("after", daemon.publish("after")) < POLL + 5
    told = [m for m in daemon.messages() if "filesystem" in m and "answer" in m]
    assert len(told) <= 4, told


@needs_faults
def test_a_hung_server_does_not_keep_the_process(daemon: Daemon) -> None:
    daemon.landed("before", daemon.publish("before"))
    with fault("hang", "unhang"):
        daemon.wait_for("the filesystem does not answer")
        tasks = Path(f"/proc/{daemon.process.pid}/task")
        assert len(list(tasks.iterdir())) <= 3, "the main thread, one reader, no more"
        started = time.monotonic()
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(10) == 0
        assert time.monotonic() - started < 5
