"""What the service manager gets to hear: a real socket in its place."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import socket
import time
from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest

from mbcap_watch import Settings, WatchState, run
from mbcap_watch.limits import STUCK_SECONDS
from mbcap_watch.telemetry.systemd import Notifier
from processes import daemon
from support import quiet, result, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RESULT = result("applied")
BEFORE = WatchState(mode="inotify", why="because")
LOOKED = WatchState(mode="inotify", why="because", last_sync=1.0)
STUCK = WatchState(mode="poll", why="because", last_sync=1.0, stuck_since=1_800_000_000.0)
WEEK = "WATCHDOG_USEC=604800000000"


class Manager:
    """Receives what a service manager would."""

    def __init__(self, address: str | bytes) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)

    def read(self) -> list[str]:
        """Return the lines of all datagrams that have come."""
        lines: list[str] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                lines += self._socket.recv(65536).decode().split("\n")
        return lines

    def read_one(self) -> list[str]:
        """Return the lines of the next datagram."""
        return self._socket.recv(65536).decode().split("\n")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "n"


@pytest.fixture
def manager(path: Path) -> Iterator[Manager]:
    with contextlib.closing(Manager(os.fspath(path))) as manager:
        yield manager


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock that the notifier reads; tests turn it."""
    now = [1000.0]
    monkeypatch.setattr("mbcap_watch.telemetry.systemd.time.monotonic", lambda: now[0])
    return now


def notifier(path: Path | str, watchdog: float = 0, sweep: str = "5s", **environ: str) -> Notifier:
    environ["NOTIFY_SOCKET"] = str(path)
    if watchdog:
        environ["WATCHDOG_USEC"] = str(int(watchdog * 1_000_000))
    return Notifier(environ, Settings.from_mapping({"database": "x", "sweep_interval": sweep}))


def fill(path: Path) -> int:
    """Send until the manager's queue is full; return how many datagrams it holds."""
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:  # each in turn: there is a limit to what one sender may have under way
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
                other.settimeout(0)
                other.sendto(b"OTHER=1", os.fspath(path))
                sent += 1
    return sent


def looks(count: int) -> list[WatchState]:
    return [WatchState(mode="inotify", why="because", last_sync=100.0 + n) for n in range(count)]


def test_ready_once_the_first_look_is_done(path: Path, manager: Manager) -> None:
    told = notifier(path)
    told.on_result(RESULT)
    told.on_state(BEFORE)
    assert manager.read() == ["STATUS=applied; starting"]
    told.on_state(LOOKED)
    assert manager.read() == ["READY=1", "STATUS=applied; watching by inotify"]
    told.on_state(LOOKED)
    assert manager.read() == []


def test_a_status_is_cut_and_has_a_datagram_of_its_own(path: Path, manager: Manager) -> None:
    told = notifier(path, watchdog=1)
    told.on_result(result("malformed", "x" * 300_000))
    told.on_state(LOOKED)
    assert [line.partition("=")[0] for line in manager.read_one()] == ["READY", "WATCHDOG_USEC"]
    (status,) = manager.read_one()
    assert status.startswith("STATUS=malformed: xxx")
    assert status.endswith("x…; watching by inotify")
    assert len(status) < 300


def test_a_status_that_cannot_be_sent_holds_no_sign_of_life_up(
    path: Path, manager: Manager, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    told = notifier(path, watchdog=60)
    sent = fill(path)
    manager.read_one()  # there is room for one
    told.on_state(LOOKED)
    lines = manager.read()
    assert lines == ["OTHER=1"] * (sent - 1) + ["READY=1"]
    assert caplog.text.count("the service manager cannot be told") == 1
    clock[0] += 31
    told.on_state(looks(1)[0])
    assert manager.read_one() == ["WATCHDOG=1"]
    assert manager.read_one() == ["STATUS=watching by inotify"]
    assert manager.read() == []


def test_stopping(path: Path, manager: Manager) -> None:
    notifier(path).stopping()
    assert manager.read() == ["STOPPING=1", "STATUS=stopping"]


def test_a_name_in_the_abstract_namespace() -> None:
    name = f"mbcap-watch-{secrets.token_hex(8)}"
    with contextlib.closing(Manager(b"\0" + name.encode())) as manager:
        notifier(f"@{name}").on_state(LOOKED)
        assert manager.read()[0] == "READY=1"


@pytest.mark.usefixtures("no_leaks")
def test_inert_without_a_socket(caplog: pytest.LogCaptureFixture) -> None:
    told = Notifier({"WATCHDOG_USEC": "1000000"}, Settings.from_mapping({"database": "x"}))
    told.on_result(RESULT)
    told.on_state(LOOKED)
    told.stopping()
    assert not caplog.records


@pytest.mark.parametrize("given", ["relative", "vsock:2:1234", "@"])
def test_an_address_that_cannot_be_used_is_named(
    given: str, caplog: pytest.LogCaptureFixture
) -> None:
    told = notifier(given)
    told.on_state(LOOKED)
    told.stopping()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert given in caplog.text


def test_an_error_is_shown_on_one_line(path: Path, manager: Manager) -> None:
    told = notifier(path)
    error = "/a\udcffb: cannot\nREADY=0"
    told.on_result(result("failed", error))
    told.on_state(LOOKED)
    assert manager.read() == [
        "READY=1",
        "STATUS=failed: /a\\udcffb: cannot\\nREADY=0; watching by inotify",
    ]


# ------------------------------------------------------------------------------ the watchdog


def test_looks_feed_the_watchdog_and_nothing_else_does(
    path: Path, manager: Manager, clock: list[float]
) -> None:
    told = notifier(path, watchdog=60)
    told.on_state(LOOKED)
    manager.read()

    clock[0] += 29
    told.on_state(looks(1)[0])
    assert manager.read() == []  # a look, but too soon

    clock[0] += 2
    told.on_state(looks(1)[0])
    assert manager.read() == []  # late enough, but not a new look

    told.on_state(looks(2)[1])
    assert manager.read() == ["WATCHDOG=1"]


@pytest.mark.parametrize("sweep", [0.01, 1.0, 5.0, 20.0, 300.0, 86400.0])
def test_whatever_the_sweep_a_bridge_that_looks_is_never_restarted(
    path: Path, manager: Manager, clock: list[float], sweep: float
) -> None:
    """The longest gaps: a look of twice STUCK_SECONDS that starts a sweep after the last one."""
    told = notifier(path, watchdog=60, sweep=f"{sweep}s")
    patience, due = 60.0, None
    for state in looks(50):
        told.on_state(state)
        for line in manager.read():
            name, _, value = line.partition("=")
            if name == "WATCHDOG_USEC":
                patience = int(value) / 1_000_000
            if name in ("READY", "WATCHDOG", "WATCHDOG_USEC"):
                due = clock[0] + patience
        assert due is not None
        clock[0] += sweep + 2 * STUCK_SECONDS - 0.001
        assert clock[0] < due


def test_the_watchdog_is_lengthened_only_if_it_must_be(path: Path, manager: Manager) -> None:
    notifier(path, watchdog=60).on_state(LOOKED)
    assert "WATCHDOG_USEC" not in "".join(manager.read())
    notifier(path, watchdog=60, sweep="5m").on_state(LOOKED)
    assert "WATCHDOG_USEC=620000000" in manager.read()


def test_a_watchdog_meant_for_another_process_is_not_fed(
    path: Path, manager: Manager, clock: list[float]
) -> None:
    for pid, fed in ((str(os.getpid()), True), ("1", False)):
        told = notifier(path, watchdog=60, WATCHDOG_PID=pid)
        told.on_state(LOOKED)
        clock[0] += 1000
        told.on_state(looks(1)[0])
        assert ("WATCHDOG=1" in manager.read()) is fed


@pytest.mark.parametrize("given", ["", "-5", "soon", "1.5", "²"])
def test_a_bad_watchdog_time(given: str, path: Path, manager: Manager) -> None:
    notifier(path, WATCHDOG_USEC=given).on_state(LOOKED)
    assert [line.partition("=")[0] for line in manager.read()] == ["READY", "STATUS"]


def test_no_restart_while_the_filesystem_does_not_answer(
    path: Path, manager: Manager, clock: list[float]
) -> None:
    told = notifier(path, watchdog=60)
    told.on_state(LOOKED)
    manager.read()

    clock[0] += 40
    told.on_state(STUCK)
    put_off, status = manager.read()  # and no WATCHDOG=1: that would be no progress
    assert put_off == WEEK
    assert status == (
        "STATUS=stuck: the filesystem has not answered a call (noticed at 2027-01-15T08:00:00Z);"
        " waiting"
    )
    clock[0] += 4000
    told.on_state(LOOKED)
    assert manager.read() == ["WATCHDOG_USEC=60000000", "STATUS=watching by inotify"]
    told.on_state(looks(1)[0])
    assert manager.read() == ["WATCHDOG=1"]


def test_a_start_that_hangs_is_given_time_and_is_not_ready(path: Path, manager: Manager) -> None:
    told = notifier(path, watchdog=60)
    told.on_state(WatchState(stuck_since=1_800_000_000.0))
    lines = manager.read()
    assert lines[0] == "EXTEND_TIMEOUT_USEC=604800000000"
    assert lines[1].startswith("STATUS=stuck")
    assert len(lines) == 2
    told.on_state(WatchState())
    assert manager.read() == ["STATUS=starting"]
    told.on_state(LOOKED)
    assert manager.read()[0] == "READY=1"


def test_a_long_look_feeds_the_watchdog_as_it_gets_on(
    path: Path, manager: Manager, clock: list[float]
) -> None:
    told = notifier(path, watchdog=60)
    told.on_state(LOOKED)
    manager.read()
    for _ in range(3):
        clock[0] += 31
        told.on_state(dataclasses.replace(LOOKED, last_progress=clock[0]))
        assert manager.read() == ["WATCHDOG=1"]
        told.on_state(dataclasses.replace(LOOKED, last_progress=clock[0]))
        assert manager.read() == []


def test_a_long_first_look_is_given_time_as_it_gets_on(
    path: Path, manager: Manager, clock: list[float]
) -> None:
    told = notifier(path, watchdog=60)
    told.on_state(WatchState(stuck_since=1.0))
    manager.read()
    for _ in range(3):
        clock[0] += 31
        told.on_state(WatchState(last_progress=clock[0]))
        assert "EXTEND_TIMEOUT_USEC=60000000" in manager.read()
    told.on_state(WatchState(last_progress=clock[0]))
    assert manager.read() == []
    told.on_state(LOOKED)
    assert manager.read()[0] == "READY=1"


# ------------------------------------------------------------------------------ trouble


def test_what_cannot_be_sent_goes_with_the_next(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    told = notifier(path)
    told.on_result(RESULT)
    told.on_state(LOOKED)
    told.on_state(STUCK)
    with contextlib.closing(Manager(os.fspath(path))) as manager:
        told.on_state(looks(1)[0])
        lines = manager.read()
    assert sorted(lines) == ["READY=1", "STATUS=applied; watching by inotify"]
    cannot = f"NOTIFY_SOCKET={path}: the service manager cannot be told"
    assert [record.getMessage() for record in caplog.records] == [
        f"{cannot}: No such file or directory; trying on",
        "the service manager can be told again",
    ]


@pytest.mark.usefixtures("no_leaks")
def test_a_manager_that_does_not_read_holds_nobody_up(path: Path, manager: Manager) -> None:
    told = notifier(path)
    told.on_state(LOOKED)
    started = time.monotonic()
    for n in range(2000):
        told.on_result(result("failed", f"{n}" * 100))
        told.on_state(LOOKED)
    assert time.monotonic() - started < 5
    assert manager.read()[0] == "READY=1"
    told.on_result(RESULT)
    told.on_state(LOOKED)
    assert manager.read()[-1] == "STATUS=applied; watching by inotify"


# ------------------------------------------------------------------------------ a real bridge


@pytest.mark.anyio
@pytest.mark.usefixtures("no_leaks")
async def test_a_bridge_with_much_to_do_at_its_start(
    path: Path, manager: Manager, database: Path, slow_pages: Callable[[int], None]
) -> None:
    slow_pages(12)
    settings = quiet(database)
    told = Notifier({"NOTIFY_SOCKET": str(path)}, settings)
    lines: list[str] = []

    def on_state(state: WatchState) -> None:
        told.on_state(state)
        lines.extend(manager.read())

    async with anyio.create_task_group() as group:
        await group.start(partial(run, settings, on_result=told.on_result, on_state=on_state))
        assert lines.count("EXTEND_TIMEOUT_USEC=60000000") >= 2
        assert lines.index("READY=1") > lines.index("EXTEND_TIMEOUT_USEC=60000000")
        assert not any("stuck" in line for line in lines)
        group.cancel_scope.cancel()


def test_the_daemon_as_systemd_runs_it(path: Path, manager: Manager, database: Path) -> None:
    """Ready with the first look, stopping on SIGTERM."""
    lines: list[str] = []

    def came(line: str) -> bool:
        lines.extend(manager.read())
        return line in lines

    with daemon(database, NOTIFY_SOCKET=str(path), WATCHDOG_USEC="60000000") as process:
        wait_until(lambda: came("READY=1") and "STATUS=no_snapshot; watching by " in str(lines))
        assert process.end(signal.SIGTERM) == 0
    assert came("STOPPING=1")
