"""The examples, as their readers run them: processes, in both modes, to the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from mbcap_watch import Entry, Snapshot, read_snapshot, write_snapshot
from processes import Process, running
from support import DEADLINE, TESTS, but_for_slowness, connect, read_rows, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.system

EXAMPLES = TESTS.parent / "examples"
INGESTOR = EXAMPLES / "ingestor.py"
STRICT = (sys.executable, "-u", "-X", "dev", "-W", "error")
MODES = pytest.mark.parametrize("mode", [(), ("--single-writer",)], ids=["run", "single-writer"])
SUP = {"confirmed": 2, "suspected": 1}


class Ingestor(Process):
    def says(self, text: str) -> bool:
        if ended := self.ended:
            self._reader.join(DEADLINE)
        said = any(text in line for line in self.lines)
        assert said or not ended, self.said
        return said

    def finish(self, number: signal.Signals | None = None) -> str:
        """Send a signal, wait for the end, and return the summary if all went well."""
        assert (self.end(number), self.errors) == (0, "")
        return self.lines[-1]

    @property
    def errors(self) -> str:
        """What went to standard error."""
        return but_for_slowness(self.said)


@contextlib.contextmanager
def ingestor(tmp_path: Path, *arguments: str) -> Iterator[Ingestor]:
    process = Ingestor([*STRICT, str(INGESTOR), *arguments], tmp_path / "err")
    with running(process):
        yield process


def counts(summary: str) -> tuple[int, ...]:
    """Return packets, nodes, rows persisted, rows wrong."""
    pattern = r"(\d+) packets, (\d+) nodes, (\d+) rows persisted, (\d+) rows wrong"
    match = re.fullmatch(pattern, summary)
    assert match is not None, summary
    return tuple(map(int, match.groups()))


def keys(database: Path) -> set[str]:
    return {key for _, key, *_ in read_rows(database)}


def has_moved_and_come_back(database: Path) -> bool:
    """Whether a node has values in both tables, so that it was moved and served twice."""
    known = [(table, key) for table, key, sup, _ in read_rows(database) if sup]
    return len({key for _, key in known}) < len(known)


# ------------------------------------------------------------------------------ the generator


@MODES
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_row_is_right_when_a_signal_ends_it(
    tmp_path: Path, mode: tuple[str, ...], number: signal.Signals
) -> None:
    database = tmp_path / "meshcore.db"
    options = ("--database", str(database), "--nodes", "40", "--publish", *mode)
    with ingestor(tmp_path, *options) as process:
        wait_until(lambda: process.says("ingesting"), "the start")
        wait_until(lambda: has_moved_and_come_back(database), "a node in both tables")
        packets, nodes, persisted, wrong = counts(process.finish(number))

    rows = read_rows(database)
    assert packets > nodes == len(keys(database)) > 0
    assert wrong == 0 < persisted
    wanted = {
        entry.public_key: (SUP[entry.status], entry.evidence or "")
        for entry in read_snapshot(database).entries
        if entry.status in SUP
    }
    assert all((sup, text) == wanted.get(key, (sup, text)) for _, key, sup, text in rows)
    with connect(database) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@MODES
def test_it_ends_by_itself_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: tuple[str, ...]
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    with ingestor(tmp_path, "--publish", "--seconds", "1", *mode) as process:
        assert counts(process.finish())[3] == 0
    assert list(scratch.iterdir()) == []


@MODES
def test_a_wrong_row_is_told_by_the_exit_code(tmp_path: Path, mode: tuple[str, ...]) -> None:
    database = tmp_path / "meshcore.db"
    options = ("--database", str(database), "--nodes", "5", *mode)
    with ingestor(tmp_path, *options) as process:
        wait_until(lambda: process.says("ingesting"), "the start")
        wait_until(lambda: len(keys(database)) > 1, "nodes")
        process.finish(signal.SIGINT)
    refused, *others = sorted(keys(database))
    write_snapshot(database, Snapshot(tuple(Entry(k, "confirmed") for k in [refused, *others])))
    with connect(database) as connection:
        for table in ("nodes", "inactive_nodes"):
            connection.execute(
                f"CREATE TRIGGER no_{table} BEFORE UPDATE OF multibyte_sup ON {table}"
                f" WHEN new.public_key = '{refused}' BEGIN SELECT RAISE(ABORT, 'refused'); END"
            )
    with ingestor(tmp_path, *options, "--seconds", "0.5") as process:
        assert (process.end(), process.errors) == (1, "")
        # In one table or in both: it may have gone stale and come back.
        assert counts(process.lines[-1])[3] in (1, 2)
    assert {key for _, key, sup, _ in read_rows(database) if sup == 2} == set(others)


# ------------------------------------------------------------------------------ other hosts


def test_a_task_group(database: Path) -> None:
    command = [*STRICT, str(EXAMPLES / "task_group.py"), str(database)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as host:
        try:
            assert host.stdout is not None
            assert host.stdout.readline().split() == [b"start", b"no_snapshot", b"0"]
            write_snapshot(database, Snapshot((Entry("aa11", "confirmed"),)))
            assert host.stdout.readline().split() == [b"rename", b"applied", b"1"]
            host.send_signal(signal.SIGINT)
            _, errors = host.communicate(timeout=DEADLINE)
            assert (host.returncode, but_for_slowness(errors.decode())) == (0, "")
        finally:
            host.kill()
    assert ("nodes", "aa11", 2, "") in read_rows(database)


@pytest.mark.anyio
@pytest.mark.usefixtures("no_leaks")
async def test_a_lifespan(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an ASGI server does: start, a few requests, shut down."""
    monkeypatch.setenv("DB_PATH", str(database))
    app = runpy.run_path(str(EXAMPLES / "lifespan.py"))["app"]
    state: dict[str, Any] = {}
    events, sent = asyncio.Queue[dict[str, str]](), asyncio.Queue[dict[str, Any]]()

    async def confirmed() -> int:
        await app({"type": "http", "state": state}, events.get, sent.put)
        assert (await sent.get())["status"] == 200
        return int((await sent.get())["body"].split()[0])

    served = asyncio.create_task(app({"type": "lifespan", "state": state}, events.get, sent.put))
    await events.put({"type": "lifespan.startup"})
    assert await sent.get() == {"type": "lifespan.startup.complete"}
    assert await confirmed() == 1
    write_snapshot(database, Snapshot((Entry("aa11", "confirmed"), Entry("ee55", "confirmed"))))
    while await confirmed() < 3:
        await asyncio.sleep(0.01)
    await events.put({"type": "lifespan.shutdown"})
    assert await sent.get() == {"type": "lifespan.shutdown.complete"}
    await served


# ------------------------------------------------------------------------------ a broker


def test_without_aiomqtt_there_is_one_clear_error() -> None:
    script = f"""if True:
        import runpy, sys
        sys.modules["aiomqtt"] = None
        sys.argv = ["ingestor.py", "--mqtt", "localhost"]
        runpy.run_path({str(INGESTOR)!r}, run_name="__main__")
    """
    done = subprocess.run(
        [*STRICT, "-c", script], capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    expected = "ingestor.py: --mqtt needs aiomqtt: pip install aiomqtt\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_adverts_of_a_broker_that_comes_late(tmp_path: Path) -> None:
    aiomqtt = pytest.importorskip("aiomqtt")
    mosquitto = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if mosquitto is None:
        pytest.skip("no mosquitto")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    known, blank = "aa" * 32, "bb" * 32
    sent = [
        json.dumps({"public_key": known, "name": "näme", "lat": 52.5}).encode(),
        json.dumps({"public_key": known, "role": "repeater"}).encode(),
        json.dumps({"public_key": blank}).encode(),
        json.dumps({"public_key": "no key"}).encode(),
        b"\xff no JSON",
    ]

    async def send() -> None:
        async with aiomqtt.Client("127.0.0.1", port) as client:
            for payload in sent:
                await client.publish("meshcore/XYZ/observer/packets", payload, qos=1)

    database = tmp_path / "meshcore.db"
    write_snapshot(database, Snapshot((Entry(known, "confirmed", "advert"),)))
    config = tmp_path / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    options = ("--database", str(database), "--mqtt", f"127.0.0.1:{port}")
    with ingestor(tmp_path, *options) as process:
        wait_until(lambda: process.says("trying again"), "a first attempt")
        with subprocess.Popen([mosquitto, "-c", str(config)], stderr=subprocess.DEVNULL) as broker:
            try:
                wait_until(lambda: process.says("listening"), "the subscription")
                asyncio.run(send())
                wanted = {("nodes", known, 2, "advert"), ("nodes", blank, 0, None)}
                wait_until(lambda: read_rows(database) == wanted, "the nodes and their values")
                # Rows that are written before their result is told would not be counted.
                wait_until(lambda: process.says("applied, 1 rows"), "the result")
                assert counts(process.finish(signal.SIGINT)) == (3, 2, 1, 0)
            finally:
                broker.kill()
    with connect(database) as connection:
        [row] = connection.execute(
            f"SELECT name, role, lat, advert_count FROM nodes WHERE public_key = '{known}'"
        )
    assert row == ("näme", "repeater", 52.5, 2)
