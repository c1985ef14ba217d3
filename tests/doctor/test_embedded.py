"""A bridge that another program embeds, as `status`, `check` and `top` see it from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from mbcap_watch import snapshot_path
from processes import call, call_json, daemon
from support import DEADLINE, document, put, read_line, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("runtime")]

# `bridge` runs one until it is cancelled, and prints "there" once it has synced. Each line that
# comes in is run in the loop.
HOST = """
    import asyncio, contextlib, functools, os, sys, threading, time
    import aiosqlite, uvloop
    from mbcap_watch import Control, Settings, run, watch

    database, way = sys.argv[1:3]
    print = functools.partial(print, flush=True)
    settings = Settings(database, *sys.argv[3:4])

    async def bridge():
        control = Control(settings)
        if way == "watch":  # nobody takes its results
            async with watch(settings, control=control):
                print("there")
                await asyncio.sleep(3600)
        options = {}
        if way == "lent":
            options = {"connection": aiosqlite.connect(database), "lock": asyncio.Lock()}
            await options["connection"]
        try:
            await run(settings, control=control, on_state=there(), **options)
        finally:
            if way == "lent":
                await options["connection"].close()

    def there():
        say = iter([print])
        return lambda _: next(say, len)("there")

    def fork():
        if os.fork() == 0:
            with contextlib.suppress(RuntimeError):  # anyio misses the loop, which is the parent's
                tasks[0].get_coro().close()
            print("left by", os.getpid())
            time.sleep(3600)

    def listen(loop, task):
        for line in sys.stdin:
            loop.call_soon_threadsafe(exec, line, globals())
        loop.call_soon_threadsafe(task.cancel)

    async def main():
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        threading.Thread(target=listen, args=(loop, task), daemon=True).start()
        global tasks
        tasks = [loop.create_task(bridge()) for _ in range(2 if way == "two" else 1)]
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        except asyncio.CancelledError:
            pass

    (uvloop if way == "lent" else asyncio).run(main())
"""


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for sockets, as systemd makes it for a program that embeds the bridge."""
    path = tmp_path / "runtime"
    path.mkdir()
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(path))
    return path / "mbcap-watch"


@contextlib.contextmanager
def host(database: Path, way: str = "run", *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program that embeds a bridge, until it has synced."""
    script = database.with_name("ingest.py")
    script.write_text(textwrap.dedent(HOST))
    pipe = subprocess.PIPE
    command = [sys.executable, str(script), str(database), way, *arguments]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            for _ in range(2 if way == "two" else 1):
                assert read_line(process) == "there"
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], code: str) -> None:
    """Have the host run a line in its loop."""
    assert process.stdin is not None
    process.stdin.write(f"{code}\n")
    process.stdin.flush()


def status(database: Path) -> tuple[int, dict[str, Any]]:
    return call_json("status", "--database", database)


def check(database: Path) -> list[dict[str, str]]:
    findings: list[dict[str, str]] = call_json("check", "--database", database)[1]["findings"]
    return findings


def codes(told: dict[str, Any]) -> list[str]:
    """Return what is said of the processes; beside other tests, other daemons run."""
    found = [each["code"] for each in told["problems"] + told["warnings"]]
    return [code for code in found if code not in ("other_settings", "no_snapshot")]


def text(told: dict[str, Any], code: str) -> str:
    [found] = [each for each in told["problems"] + told["warnings"] if each["code"] == code]
    return str(found["text"])


@pytest.mark.parametrize("way", ["run", "watch", "lent"])
def test_it_is_seen_as_a_daemon_is(database: Path, runtime: Path, way: str) -> None:
    with host(database, way) as process:
        put(document(("aa11", "confirmed")), snapshot_path(database))
        applied: list[tuple[int, dict[str, Any]]] = []

        def is_applied() -> bool:
            applied.append(status(database))
            return bool(applied[-1][1]["stats"]["outcomes"]["applied"])

        wait_until(is_applied)
        code, told = applied[-1]
        assert (code, told["state"], codes(told)) == (0, "running", [])
        assert told["stats"]["pid"] == process.pid
        program = f"{os.path.basename(sys.executable)} {database.parent}"[:60]
        assert told["stats"]["embedded_in"].startswith(program)
        name = f"{process.pid} (user {os.geteuid()}), embedded in {program[:10]}"
        if way == "run":
            for command in ("status", "top"):
                assert name in " ".join(call(command, "--database", database).stdout.split())
            findings = check(database)
            [service] = [each for each in findings if each["subject"] == "service"]
            assert (service["severity"], name in service["text"]) == ("ok", True)
            [daemons] = [each for each in findings if each["subject"] == "daemons"]
            assert f"pid {process.pid} (user " in daemons["text"]
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(DEADLINE) == 0
    assert list(runtime.iterdir()) == []
    assert codes(status(database)[1]) == ["not_running"]


def test_a_daemon_and_an_embedded_one_do_the_same_work_twice(database: Path) -> None:
    with host(database) as process, daemon(database) as beside:
        wait_until(lambda: "several_bridges" in codes(status(database)[1]))
        code, told = status(database)
        said = text(told, "several_bridges")
        assert (code, said.startswith("2 bridges serve this database")) == (0, True)
        assert f"{beside.popen.pid} (user " in said
        assert f"{process.pid} (user {os.geteuid()}), embedded in " in said
        [several] = [each for each in check(database) if each["code"] == "several_bridges"]
        assert (several["severity"], several["text"].startswith("2 bridges")) == ("warning", True)
        for each in (process, beside.popen):
            assert f"pid {each.pid} (user " in several["text"]
        tell(process, "time.sleep(3600)")  # the healthy one is the one that counts
        silent = f"pid {process.pid} (user {os.geteuid()}): stuck"
        wait_until(lambda: silent in text(status(database)[1], "several_bridges"))
        code, told = status(database)
        assert (code, told["stats"]["pid"]) == (0, beside.popen.pid)


def test_two_in_one_process_have_a_socket_each(database: Path, runtime: Path) -> None:
    with host(database, "two") as process:
        said = text(status(database)[1], "several_bridges")
        assert (said[:9], said.count(f"{process.pid} (user ")) == ("2 bridges", 2)
        assert len(list(runtime.iterdir())) == 2
        tell(process, "tasks[0].cancel()")
        wait_until(lambda: len(list(runtime.iterdir())) <= 1)
        assert status(database)[0] == 0


def test_two_with_two_snapshots_undo_each_others_work(database: Path, tmp_path: Path) -> None:
    with host(database), host(database, "run", str(tmp_path / "other")):
        code, told = status(database)
        assert (code, codes(told)) == (1, ["two_snapshots"])
        assert str(tmp_path / "other") in text(told, "two_snapshots")


def test_a_host_that_is_blocked_paused_or_killed(database: Path) -> None:
    with host(database) as process:
        process.send_signal(signal.SIGSTOP)
        code, told = status(database)
        assert (code, told["state"], codes(told)) == (1, "paused", ["paused"])
        process.send_signal(signal.SIGCONT)
        assert status(database)[0] == 0
        tell(process, "print('blocked'); time.sleep(3600)")
        assert read_line(process) == "blocked"
        code, told = status(database)
        assert (code, told["state"], codes(told)) == (1, "stuck", ["blocked"])
        assert f"pid {process.pid} ({sys.executable} " in text(told, "blocked")
        assert "its event loop is blocked" in text(told, "blocked")
        process.kill()
        process.wait()
        code, told = status(database)
        assert (code, told["state"], codes(told)) == (1, "not running", ["gone"])


def test_a_fork_neither_ends_the_socket_nor_answers_for_its_parent(
    database: Path, runtime: Path
) -> None:
    with host(database) as process:
        tell(process, "fork()")
        child = int(read_line(process).removeprefix("left by "))
        try:
            assert (status(database)[0], len(list(runtime.iterdir()))) == (0, 1)
            process.kill()
            process.wait()
            assert codes(status(database)[1]) == ["gone"]
        finally:
            os.kill(child, signal.SIGKILL)
