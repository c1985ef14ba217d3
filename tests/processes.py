"""Processes that a test starts and listens to: the daemon, `apply`, and the neighbours."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from support import DEADLINE, TESTS, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from forked import Forked

MBCAP_WATCH = [sys.executable, "-m", "mbcap_watch"]
Call: TypeAlias = "Callable[..., subprocess.CompletedProcess[str]]"


def call(
    *arguments: object,
    prefix: Sequence[str] = (),
    stdin: bytes = b"",
    env: dict[str, str] | None = None,
    code: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end, after some `code`; return what it printed, to the byte."""
    command = MBCAP_WATCH
    if code:
        command = [sys.executable, "-c", f"{code}\nfrom mbcap_watch.cli.app import main\nmain()"]
    done = subprocess.run(
        [*prefix, *command, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env=os.environ | (env or {}),
        timeout=DEADLINE,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def call_json(*arguments: object, **options: Any) -> tuple[int, Any]:
    """Run it with `--json`; return its exit code and the one object that it printed."""
    done = call(*arguments, "--json", **options)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


class Process:
    """A program of ours that runs: its lines are read at once, its errors go to a file.

    Attributes:
        start: what starts programs (see `started_by`).
        lines: what it has printed.
        log: the file with its standard error.
        popen: the process.

    """

    start: ClassVar[Callable[..., subprocess.Popen[str] | Forked]] = subprocess.Popen

    def __init__(self, command: Sequence[str | Path], log: Path, **options: Any) -> None:
        self.lines: list[str] = []
        self.log = log
        with open(log, "wb") as stderr:
            self.popen = self.start(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                **options,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line.strip())

    @property
    def said(self) -> str:
        """What it has written to standard error."""
        return self.log.read_text()

    @property
    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    @property
    def ended(self) -> bool:
        return self.popen.poll() is not None

    def ready(self, line: str = "") -> Process:
        """Return once it has printed a line that begins so."""

        def printed() -> bool:
            return any(each.startswith(line) for each in self.lines)

        wait_until(lambda: printed() or self.ended, line or "a first line")
        assert printed(), self.said
        return self

    def ended_or_waits(self) -> bool:
        """Return once it has ended, or said why it has not yet; whether it has ended."""
        wait_until(lambda: self.ended or self.said, "an answer")
        return self.ended

    def end(self, signum: signal.Signals | None = None) -> int:
        """Tell it to end, by a signal if there is one; return its exit code."""
        if signum is not None:
            self.popen.send_signal(signum)
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.close()  # whoever waits for a line hears that as well
        code = self.popen.wait(DEADLINE)
        self._reader.join(DEADLINE)
        self.popen.stdout.close()
        return code


@contextlib.contextmanager
def started_by(start: Callable[..., subprocess.Popen[str] | Forked]) -> Iterator[None]:
    """Start programs another way for a while."""
    before, Process.start = Process.start, start
    try:
        yield
    finally:
        Process.start = before


@contextlib.contextmanager
def running(process: Process) -> Iterator[Process]:
    """Have it killed at the end if it still runs."""
    try:
        yield process
    finally:
        process.end(signal.SIGKILL)


def start_daemon(
    database: Path, *options: str, prefix: Sequence[str] = (), **variables: str
) -> Process:
    command = [*prefix, *MBCAP_WATCH, "run", "--json", f"--database={database}", *options]
    env = {"env": os.environ | variables} if variables else {}
    return Process(command, database.with_name("daemon.txt"), **env)


@contextlib.contextmanager
def daemon(
    database: Path, *options: str, prefix: Sequence[str] = (), **variables: str
) -> Iterator[Process]:
    """Run `mbcap-watch run`, from its first result on."""
    with running(start_daemon(database, *options, prefix=prefix, **variables)) as process:
        yield process.ready()


def apply(database: Path, *options: str) -> Process:
    command = [*MBCAP_WATCH, "apply", "--json", f"--database={database}", *options]
    return Process(command, database.with_name("apply.txt"))


def neighbour(role: str, database: Path, *arguments: str, log: Path | None = None) -> Process:
    """Start one of `neighbours.py`, and wait until it has the database open."""
    command = [sys.executable, str(TESTS / "neighbours.py"), role, str(database), *arguments]
    return Process(command, log or database.with_name(f"{role}.txt")).ready("ready")
