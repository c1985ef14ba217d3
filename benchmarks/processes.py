"""Other processes: helpers of the bench that answer, and programs that are measured."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    from benchmarks.lab import Site

ROOT: Final = Path(__file__).parent.parent
OURS: Final = (sys.executable, "-m", "mbcap_watch", "run", "--json", "--log-level", "error")


class Helper:
    """A process of `python -m benchmarks.MODULE` that answers one JSON line per JSON line."""

    def __init__(self, module: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, request: object = None) -> None:
        """Send a request and do not wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def receive(self) -> Any:
        """Wait for an answer."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, request: object = None) -> Any:
        """Send a request and wait for its answer."""
        self.send(request)
        return self.receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate()


class Running(NamedTuple):
    """A program that runs, and the lines that it has printed since it was ready."""

    pid: int
    lines: list[str]


@contextlib.contextmanager
def running(command: Sequence[object], *, ready: bool = True) -> Iterator[Running]:
    """Run a program with a session of its own; wait for its first line if `ready`.

    What it prints is read all the time: a full pipe would stop it.
    """
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=lines.extend, args=(process.stdout,))
    try:
        if ready and not process.stdout.readline():
            raise ChildProcessError(f"{command} has ended")
        reader.start()
        yield Running(process.pid, lines)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        if reader.ident is not None:
            reader.join()
        process.wait()
        process.stdout.close()


def ours(site: Site, *options: str) -> list[object]:
    """Return the command of our daemon."""
    return [*OURS, *options, "--database", site.database]
