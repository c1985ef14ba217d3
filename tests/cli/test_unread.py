"""Nobody reads what the daemon writes: the bridge works on, and says what was lost."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from mbcap_watch import snapshot_path
from mbcap_watch.telemetry.outputs import MOST_LINES, LineWriter
from mbcap_watch.telemetry.stats import Output
from support import DEADLINE, document, put, read_rows, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.system]

APPLIED = ("nodes", "aa11", 2, "")

# So few lines are kept for a reader there, not to have to publish more than a thousand times.
KEPT = 20
DAEMON = f"""
from mbcap_watch import __main__
from mbcap_watch.telemetry import outputs
outputs.MOST_LINES = {KEPT}
__main__.main()
"""

CHATTY = ("run", "--json", "--log-level", "debug", "--debounce", "0s")


class Pipe:
    """A small pipe; `fill` makes it as full as it gets."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, 4096)

    def fill(self) -> None:
        # Opened anew, so that it is not the daemon's end that does not block.
        filler = os.open(f"/proc/self/fd/{self.write_end}", os.O_WRONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while os.write(filler, b"\n"):
                pass
        os.close(filler)

    @contextlib.contextmanager
    def read(self) -> Iterator[bytearray]:
        """Read all that comes from now on, in a thread, until the last writer has gone."""
        got = bytearray()

        def keep_reading() -> None:
            while data := os.read(self.read_end, 65536):
                got.extend(data)

        thread = threading.Thread(target=keep_reading)
        thread.start()
        try:
            yield got
        finally:
            os.close(self.write_end)
            self.write_end = -1
            thread.join()

    def close(self) -> None:
        os.close(self.read_end)
        if self.write_end >= 0:
            os.close(self.write_end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


@contextlib.contextmanager
def daemon(
    database: Path, arguments: tuple[str, ...], stdout: int, stderr: int
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", DAEMON, *arguments, "--database", str(database)]
    with subprocess.Popen(command, stdout=stdout, stderr=stderr) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def file(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    yield descriptor
    os.close(descriptor)


def have_results(database: Path, path: Path, number: int) -> None:
    """Publish until there are `number` lines more; each result is one on either stream."""
    wanted = count(path) + number
    numbers = itertools.count()

    def enough() -> bool:
        put(
            document(("none", "unknown"), written_at=f"2026-01-01T00:00:00.{next(numbers)}Z"),
            snapshot_path(database),
        )
        return count(path) >= wanted

    wait_until(enough, "many results")


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n")


@pytest.mark.parametrize("again", [True, False], ids=["read again", "never read"])
def test_a_log_that_nobody_reads(database: Path, tmp_path: Path, pipe: Pipe, again: bool) -> None:
    results = tmp_path / "results.jsonl"
    pipe.fill()
    with file(results) as stdout, daemon(database, CHATTY, stdout, pipe.write_end) as process:
        # Each has a line in the log, too. Some more than are kept for the reader.
        have_results(database, results, KEPT + 30)
        put(document(("aa11", "confirmed")), snapshot_path(database))
        wait_until(lambda: APPLIED in read_rows(database), "the snapshot")
        if not again:
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 0
            return
        with pipe.read() as got:
            wait_until(lambda: b" lines of the log are lost" in got, "the count")
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 0

    lines = got.decode().strip().splitlines()
    assert " INFO mbcap-watch " in lines[0]
    assert lines[-1].endswith(" INFO stopped")
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    place = next(n for n, line in enumerate(lines) if "lines of the log are lost" in line)
    assert place == KEPT, "what was kept stands before the count"
    assert " WARNING " in lines[place]


def test_the_count_of_lost_lines_is_json_too(database: Path, tmp_path: Path, pipe: Pipe) -> None:
    results = tmp_path / "results.jsonl"
    pipe.fill()
    arguments = (*CHATTY, "--log-format", "json", "--log-level", "debug")
    with file(results) as stdout, daemon(database, arguments, stdout, pipe.write_end) as process:
        have_results(database, results, KEPT + 30)
        with pipe.read() as got:
            wait_until(lambda: b" lines of the log are lost" in got, "the count")
            process.terminate()
            process.wait(DEADLINE)
    lines = [json.loads(line) for line in got.decode().strip().splitlines()]
    said = next(line for line in lines if "lost" in line)
    assert said["message"].startswith(f"{said['lost']} lines of the log are lost")


@pytest.mark.parametrize("again", [True, False], ids=["read again", "never read"])
def test_results_that_nobody_reads(database: Path, tmp_path: Path, pipe: Pipe, again: bool) -> None:
    log = tmp_path / "log.txt"
    pipe.fill()
    with file(log) as stderr, daemon(database, CHATTY, pipe.write_end, stderr) as process:
        have_results(database, log, KEPT + 30)
        put(document(("aa11", "confirmed")), snapshot_path(database))
        wait_until(lambda: APPLIED in read_rows(database), "the snapshot")
        lost = " results are lost: nobody read standard output"
        if not again:
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 0
            assert lost in log.read_text()  # said at the end at the latest
            return
        with pipe.read() as got:
            wait_until(lambda: lost in log.read_text(), "the count")
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 0

    assert all("outcome" in json.loads(line) for line in got.decode().strip().splitlines())
    assert "Traceback" not in log.read_text()


def test_a_reader_of_the_log_that_leaves(database: Path, tmp_path: Path, pipe: Pipe) -> None:
    results = tmp_path / "results.jsonl"
    with file(results) as stdout, daemon(database, CHATTY, stdout, pipe.write_end) as process:
        os.read(pipe.read_end, 1)
        os.close(pipe.read_end)
        pipe.read_end = os.open(os.devnull, os.O_RDONLY)
        put(document(("aa11", "confirmed")), snapshot_path(database))
        wait_until(lambda: APPLIED in read_rows(database), "the snapshot")
        have_results(database, results, 10)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0


def test_a_log_that_was_closed_before_the_start(database: Path) -> None:
    """Its number is given to the next file that is opened: the log may not land in that one."""
    put(document(("aa11", "confirmed")), snapshot_path(database))
    command = f"exec {sys.executable} -m mbcap_watch run --database {database} 2>&-"
    with subprocess.Popen(["sh", "-c", command]) as process:
        try:
            wait_until(lambda: APPLIED in read_rows(database), "the snapshot")
            process.terminate()
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()


def test_a_consumer_that_leaves_ends_the_daemon(database: Path, tmp_path: Path, pipe: Pipe) -> None:
    """At once, not at the next result, which may be five minutes away."""
    log = tmp_path / "log.txt"
    os.close(pipe.read_end)
    pipe.read_end = os.open(os.devnull, os.O_RDONLY)
    arguments = ("run", "--json")
    with file(log) as stderr, daemon(database, arguments, pipe.write_end, stderr) as process:
        assert process.wait(DEADLINE) == 1
    assert "standard output cannot be written: [Errno 32] Broken pipe" in log.read_text()
    assert "Traceback" not in log.read_text()


# ------------------------------------------------------------------------------ the writer


def test_a_reader_that_stops_is_a_problem_until_it_reads_again(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbcap_watch.telemetry.outputs._UNREAD_SECONDS", 0.05)
    writer = LineWriter(pipe.write_end, str)
    assert writer.output() == Output(None, None)
    before = time.time()
    writer.write("read")
    assert writer.flush(DEADLINE) == 0
    assert not writer.output().problem
    assert before - 1 < (writer.output().last_good or 0) < time.time() + 1
    pipe.fill()
    for _ in range(MOST_LINES + 2):
        writer.write("unread")
    wait_until(lambda: writer.output().problem, "the problem")
    assert writer.output().problem == f"nobody reads it: {MOST_LINES} lines wait, 2 are lost"
    with pipe.read():
        wait_until(lambda: not writer.output().problem, "the end of it")
        assert writer.flush(DEADLINE) == 0


def test_a_descriptor_that_does_not_block(pipe: Pipe) -> None:
    """A parent may have made it so; the lines wait for the reader all the same."""
    os.set_blocking(pipe.write_end, False)
    writer = LineWriter(pipe.write_end, str)
    for number in range(MOST_LINES):
        writer.write(f"{number:0100}")
    with pipe.read() as got:
        assert writer.flush(DEADLINE) == 0
    assert got.decode().split() == [f"{number:0100}" for number in range(MOST_LINES)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_and_its_lines_are_counted(tmp_path: Path) -> None:
    lost: list[int] = []
    errors: list[str | None] = []

    def on_lost(count: int) -> None:
        lost.append(count)

    descriptor = os.open("/dev/full", os.O_WRONLY)
    writer = LineWriter(descriptor, on_lost, lambda exc: errors.append(exc.strerror))
    for _ in range(3):
        writer.write("x")
    assert writer.flush(DEADLINE) == 3
    assert lost == []
    assert writer.output() == Output("No space left on device", None)
    with file(tmp_path / "log.txt") as healed:
        os.dup2(healed, descriptor)
        writer.write("y")
        assert writer.flush(DEADLINE) == 0
    assert lost == [3]
    assert errors == ["No space left on device"] * 3
    assert writer.output().problem is None
    os.close(descriptor)


def test_without_a_thread_lines_are_written_as_long_as_that_does_not_block(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    writer = LineWriter(pipe.write_end, str)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        writer.write("at once")
        assert os.read(pipe.read_end, 100) == b"at once\n"
        pipe.fill()
        writer.write("later")
        assert writer.flush(0.0) == 1
    with pipe.read() as got:
        writer.write("with a thread")
        assert writer.flush(DEADLINE) == 0
    assert got.decode().split("\n")[-3:] == ["later", "with a thread", ""]
