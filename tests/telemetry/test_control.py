"""The control socket: made safely, answered at once, trusted by whose it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import msgspec
import pytest
import trio

from fuse import fuse
from machine import NOBODY, as_root
from mbcap_watch import Control, EventLoopError, Settings, Timings, WatchState, run, watch
from mbcap_watch.bridge import service
from mbcap_watch.bridge.report import SyncReport
from mbcap_watch.telemetry import control as control_socket
from mbcap_watch.telemetry.ask import _MOST_SOCKETS, SILENT_SECONDS, Peer, ask, digest_of
from mbcap_watch.telemetry.control import ControlSocket
from mbcap_watch.telemetry.metrics import Metrics
from mbcap_watch.telemetry.stats import HISTORY
from support import (
    QUIET,
    offered,
    open_descriptors,
    other_process,
    planted,
    read_line,
    result,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mbcap_watch.telemetry.stats import Stats

SETTINGS = Settings(Path("/data/meshcore.db"))
ELSEWHERE = Settings(Path("/data/meshcore.db"), Path("/nfs/mbcap-snapshot"))
pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def root() -> Iterator[Path]:
    """A root directory of the test's, with the places in which a socket may be."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    for name in ("run/user", "dev/shm", "tmp"):
        (path / name).mkdir(parents=True)
    yield path
    shutil.rmtree(path)


def sample(settings: Settings = SETTINGS, error: str = "", results: int = 0) -> Stats:
    metrics = Metrics(settings, version="1", pid=42)
    for number in range(results):
        metrics.on_result(result("failed", error, changed_active=number))
    return metrics.snapshot(time.time())


def home(root: Path) -> Path:
    return root / f"dev/shm/mbcap-watch-{os.geteuid()}"


def asked(root: Path, environ: dict[str, str] | None = None) -> list[Peer]:
    return ask(SETTINGS, environ or {}, root)


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(str(path))
    return client


def read_all(client: socket.socket) -> bytes:
    with client:
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


def test_whoever_connects_gets_the_stats_of_that_moment(root: Path) -> None:
    with offered(SETTINGS, {}, sample, root):
        [first] = asked(root)
        [second] = asked(root)
        assert stat.S_IMODE(first.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(first.path.parent.stat().st_mode) == 0o700
    assert (first.fate, first.named, first.uid) == ("answered", True, os.geteuid())
    assert first.stats is not None
    assert second.stats is not None
    assert (first.stats.pid, first.stats.uid) == (os.getpid(), os.geteuid())  # the kernel's word
    assert first.stats.sampled < second.stats.sampled
    assert asked(root) == []
    assert os.listdir(home(root)) == []


@pytest.mark.parametrize("name", ["RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"])
def test_a_directory_that_the_environment_names_comes_first(
    root: Path, tmp_path: Path, name: str
) -> None:
    environ = {name: f"{tmp_path}:/other" if name == "RUNTIME_DIRECTORY" else str(tmp_path)}
    with offered(SETTINGS, environ, sample, root):
        [peer] = asked(root, environ)
        assert peer.path.is_relative_to(tmp_path)
        assert not home(root).exists()


@pytest.mark.parametrize(
    "place",
    [
        "run/mbcap-watch",
        "run/mbcap-watch@north",
        "run/ingestor",
        "run/user/1000/mbcap-watch",
        "dev/shm/mbcap-watch-7",
        "tmp/mbcap-watch-7",
    ],
)
def test_it_is_found_however_it_was_started(root: Path, place: str) -> None:
    (root / place).mkdir(parents=True)
    with offered(SETTINGS, {"RUNTIME_DIRECTORY": str(root / place)}, sample, root):
        [peer] = asked(root)
    assert (peer.fate, peer.named) == ("answered", True)


@pytest.mark.system
def test_a_filesystem_in_run_that_is_gone_is_in_nobodys_way(root: Path, tmp_path: Path) -> None:
    for near in ("run/gone", "run/user/1000"):
        (root / near).mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        for near in ("run/gone", "run/user/1000"):
            process = stack.enter_context(fuse("bindfs", tmp_path, root / near))
            process.kill()
            process.wait()
        with offered(SETTINGS, {}, sample, root):
            assert [peer.fate for peer in asked(root)] == ["answered"]


def test_the_path_may_be_longer_than_that_of_a_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    environ = {"RUNTIME_DIRECTORY": str(deep)}
    with offered(SETTINGS, environ, sample, tmp_path):
        assert [peer.fate for peer in asked(tmp_path, environ)] == ["answered"]


def test_other_settings_have_another_name(root: Path) -> None:
    with offered(ELSEWHERE, {}, partial(sample, ELSEWHERE), root):
        [peer] = asked(root)
        assert (peer.fate, peer.named) == ("answered", False)  # it may be a twin
        another = Settings(Path("/other/meshcore.db"))
        assert [(each.fate, each.named) for each in ask(another, {}, root)] == [("answered", False)]


def test_a_bridge_is_found_among_more_than_are_asked(root: Path) -> None:
    with offered(SETTINGS, {}, sample, root):
        [home] = {peer.path.parent for peer in asked(root)}
        for number in range(_MOST_SOCKETS):
            (home / f"{number:016x}-1-{number:08x}.sock").touch()
        assert [peer.fate for peer in asked(root) if peer.named] == ["answered"]


def test_the_largest_answer_arrives_whole(root: Path) -> None:
    stats = sample(error="\x00ß" * 5000, results=300)
    with offered(SETTINGS, {}, lambda: stats, root):
        [peer] = asked(root)
    assert peer.stats is not None
    assert peer.stats.last_error is not None
    assert len(peer.stats.last_error.error) == 5000
    assert len(peer.stats.history) == HISTORY


# ------------------------------------------------------------------------------ where it is made


def test_what_killed_daemons_left_goes_at_the_next_start_and_the_living_stay(root: Path) -> None:
    script = """
        import asyncio, os, sys
        from pathlib import Path
        from mbcap_watch import Settings
        from mbcap_watch.telemetry.control import ControlSocket
        async def main():
            with ControlSocket(Settings("/data/meshcore.db"), {}, lambda: 1, Path(sys.argv[1])):
                print("there", flush=True)
                await asyncio.sleep(3600)
        asyncio.run(main())
    """
    with other_process(script, str(root)) as killed, other_process(script, str(root)) as living:
        assert read_line(killed) == read_line(living) == "there"
        killed.kill()
        killed.wait()
        assert {(each.pid, each.fate) for each in asked(root)} == {
            (killed.pid, "gone"),
            (living.pid, "odd"),
        }
        with offered(SETTINGS, {}, sample, root):
            assert {each.pid for each in asked(root)} == {living.pid, os.getpid()}


@pytest.mark.anyio
async def test_it_is_made_again_when_its_directory_was_tidied_away(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ControlSocket(SETTINGS, {}, sample, root) as control:
        shutil.rmtree(home(root))
        control.ensure()
        [peer] = await anyio.to_thread.run_sync(asked, root)
        assert peer.fate == "answered"
    assert not caplog.records


@pytest.mark.anyio
async def test_where_none_can_be_made_the_log_says_why_once(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mbcap_watch")
    for name in ("dev/shm", "run", "tmp"):
        shutil.rmtree(root / name)
        (root / name).touch()
    with ControlSocket(SETTINGS, {"RUNTIME_DIRECTORY": "/proc"}, sample, root) as control:
        control.ensure()
        control.ensure()
        [record] = caplog.records
        for text in (
            "/proc/mbcap-watch: ",
            f"{home(root)}: Not a directory",
            "run/mbcap-watch-",
            "tries again",
        ):
            assert text in record.getMessage()
        (root / "tmp").unlink()
        (root / "tmp").mkdir()
        control.ensure()
        assert [each.fate for each in await anyio.to_thread.run_sync(asked, root)] == ["answered"]
        assert "is there" in caplog.records[1].getMessage()


@pytest.mark.parametrize("kind", ["writable", "link", "foreign", "file"])
def test_a_directory_that_is_not_ours_alone_is_not_used(
    root: Path, tmp_path: Path, kind: str
) -> None:
    place = home(root)
    if kind == "link":
        place.symlink_to(tmp_path)
    elif kind == "file":
        place.touch()
    else:
        place.mkdir()
        if kind == "writable":
            place.chmod(0o777)
        elif os.geteuid():
            pytest.skip("needs root, to be somebody else")
        else:
            os.chown(place, NOBODY, NOBODY)
    with offered(SETTINGS, {}, sample, root):
        [peer] = asked(root)
        assert peer.path.parent == root / f"run/mbcap-watch-{os.geteuid()}"  # the next one
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ hostile clients


def test_clients_that_say_nothing_dribble_or_flood_hold_up_nobody(root: Path) -> None:
    with offered(SETTINGS, {}, sample, root):
        [peer] = asked(root)
        silent = [connect(peer.path) for _ in range(20)]
        gone = [connect(peer.path) for _ in range(20)]
        for client in gone:
            client.close()
        flood = connect(peer.path)
        with contextlib.suppress(OSError):  # closed at the other end, unread
            flood.sendall(b"x" * (10 << 20))
        dribble = connect(peer.path)
        with contextlib.suppress(OSError):
            for _ in range(10):
                dribble.send(b"G")
        [again] = asked(root)
        assert again.fate == "answered"
        for client in silent:
            assert json.loads(read_all(client))["version"] == "1"
        flood.close()
        dribble.close()


def test_many_clients_at_once(root: Path) -> None:
    answers: list[bytes] = []
    with offered(SETTINGS, {}, sample, root):
        [peer] = asked(root)

        def client() -> None:
            for _ in range(20):
                answers.append(read_all(connect(peer.path)))

        threads = [threading.Thread(target=client) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len([json.loads(each) for each in answers]) == 320


@pytest.mark.anyio
async def test_without_a_descriptor_it_answers_later_and_does_not_spin(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_socket, "_RETRY_SECONDS", 0.05)
    tries = 0

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            nonlocal tries
            tries += 1
            if tries < 4:
                raise OSError(24, "Too many open files")
            return super().accept()

    monkeypatch.setattr("mbcap_watch.telemetry.control.socket.socket", Listener)
    with ControlSocket(SETTINGS, {}, sample, root):
        answers: list[Peer] = []
        started = time.monotonic()
        async with anyio.create_task_group() as group:

            async def client() -> None:
                answers.extend(await anyio.to_thread.run_sync(asked, root))

            group.start_soon(client)
        assert time.monotonic() - started >= 0.15
    assert [each.fate for each in answers] == ["answered"]
    assert tries == 4


# ------------------------------------------------------------------------------ hostile servers


def listen(root: Path, name: str, *, backlog: int = 5) -> socket.socket:
    place = root / "dev/shm/mbcap-watch-7"
    place.mkdir(exist_ok=True)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(place / name))
    server.listen(backlog)
    return server


NAME = f"{digest_of(SETTINGS)}-7-00000000.sock"


def test_one_that_does_not_answer_is_silent_and_delays_no_other(root: Path) -> None:
    with listen(root, NAME), offered(SETTINGS, {}, sample, root):
        started = time.monotonic()
        assert {each.fate for each in asked(root)} == {"silent", "answered"}
        assert time.monotonic() - started >= SILENT_SECONDS


def test_one_whose_queue_is_full_is_silent(root: Path) -> None:
    with listen(root, NAME, backlog=0) as server, contextlib.ExitStack() as stack:
        client = socket.socket(socket.AF_UNIX)
        stack.enter_context(client)
        client.connect(server.getsockname())
        assert [each.fate for each in asked(root)] == ["silent"]


@pytest.mark.parametrize(
    "answer", [b"{", b"[" * 100_000, b"\xff", b'{"version":"0"}', b" " * (2 << 20)]
)
def test_an_answer_that_is_none_is_odd(root: Path, answer: bytes) -> None:
    with listen(root, NAME) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client, contextlib.suppress(OSError):
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert [each.fate for each in asked(root)] == ["odd"]
        thread.join()


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_socket_is_not_opened(root: Path, make: Callable[[Path], object]) -> None:
    (root / "run/mbcap-watch").mkdir()
    make(root / "run/mbcap-watch" / NAME)
    assert [each.fate for each in asked(root)] == ["odd"]


@as_root
def test_the_kernel_says_whose_socket_it_is(root: Path) -> None:
    """A socket that another user offers, in a directory that pretends to be root's."""
    lie = msgspec.json.encode(sample())
    with planted(root / "dev/shm/mbcap-watch-0" / NAME, lie) as pid:
        [peer] = asked(root)
    assert (peer.uid, peer.pid, peer.named) == (NOBODY, pid, True)
    assert peer.stats is not None
    assert (peer.stats.uid, peer.stats.pid) == (NOBODY, pid)


@as_root
def test_another_user_gets_no_answer(root: Path) -> None:
    with offered(SETTINGS, {}, sample, root):
        [peer] = asked(root)
        for path in (peer.path, peer.path.parent):
            path.chmod(0o777)  # the file system would let him in
        script = f"""
            import os, socket, sys
            os.setgid({NOBODY}), os.setuid({NOBODY})
            client = socket.socket(socket.AF_UNIX)
            client.connect(sys.argv[1])
            print(len(client.recv(10)), flush=True)
        """
        with other_process(script, str(peer.path)) as process:
            assert read_line(process) == "0"


# ------------------------------------------------------------------------------ in a host


@pytest.mark.anyio
async def test_what_the_host_does_not_take_is_counted_and_a_hang_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "STUCK_SECONDS", 0.05)
    control = Control(SETTINGS, {"XDG_RUNTIME_DIR": str(tmp_path)})
    border = service.Border(asyncio.get_running_loop().call_soon, 3, control)
    with control.connected(lambda: border.state):
        for number in range(10):
            timings = Timings(lag=0.1, waits=(), holds=())
            report = SyncReport(result=result("applied"), timings=timings)
            border.tell(WatchState(last_sync=number), report)
            await asyncio.sleep(0)
        stats = control.sample()
        assert (stats.outcomes["applied"], stats.lag_ms.count) == (10, 10)
        assert (stats.watch.reports_dropped, stats.watch.stuck_since) == (7, None)
        border.alive()  # a sync begins, and gets no further
        await until(lambda: control.sample().watch.stuck_since is not None)
    border.tell(WatchState(), None)  # of a bridge that was left behind
    await asyncio.sleep(0)
    assert list((tmp_path / "mbcap-watch").iterdir()) == []


@pytest.mark.anyio
async def test_run_that_is_cancelled_at_any_moment_leaves_no_socket(
    database: Path, tmp_path: Path
) -> None:
    settings = Settings.from_mapping({"database": database, **QUIET})
    control = Control(settings, {"XDG_RUNTIME_DIR": str(tmp_path)})
    for moment in range(20):
        with anyio.move_on_after(moment / 1000):
            await run(settings, control=control)
        assert list((tmp_path / "mbcap-watch").iterdir()) == []


def test_a_host_on_trio_is_refused_at_once(database: Path) -> None:
    settings = Settings(database)
    with pytest.raises(EventLoopError, match="asyncio only"):
        trio.run(partial(run, settings, control=Control(settings)))


@pytest.mark.anyio
async def test_each_bridge_needs_a_control_of_its_own_for_its_settings(
    database: Path, tmp_path: Path
) -> None:
    settings = Settings(database)
    control = Control(settings, {"XDG_RUNTIME_DIR": str(tmp_path)})
    with pytest.raises(ValueError, match="other settings"):
        await run(Settings(database, tmp_path), control=control)
    async with watch(settings, control=control):
        with pytest.raises(RuntimeError, match="each needs one of its own"):
            await run(settings, control=control)
        assert len(list((tmp_path / "mbcap-watch").iterdir())) == 1


def test_the_words_of_a_command_line_are_few_and_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/bin/\x1b[31m", "\udcff", "x" * 1000])
    program = Control(SETTINGS).sample().embedded_in
    assert program is not None
    assert len(program) == 100
    assert program.startswith(r"\x1b[31m \udcff xxx")
    assert Control(SETTINGS, embedded=False).sample().embedded_in is None


def test_a_question_leaves_no_descriptor(root: Path) -> None:
    with offered(SETTINGS, {}, sample, root):
        before = open_descriptors()
        for _ in range(3):
            asked(root)
        assert set(open_descriptors()) <= set(before)


def test_status_costs_little_to_import() -> None:
    """A HEALTHCHECK asks every half minute: neither rich nor the bridge may be loaded for it."""
    script = "import mbcap_watch.doctor.service, sys; print('rich' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
