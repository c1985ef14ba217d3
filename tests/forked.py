"""Programs that begin as a fork of a process that has already imported what they need.

A new Python imports for a sixth of a second before `mbcap-watch` begins. The campaign that starts a
hundred thousand of them uses `started_by(Forked)`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from multiprocessing.connection import Connection
from subprocess import PIPE
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import signal
    from collections.abc import Sequence

SERVER: Final = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["forked", "mbcap_watch.cli.app", "aiosqlite"])


class Forked:
    """What the tests use of `subprocess.Popen`, for `python -m MODULE …` and `python FILE …`."""

    def __init__(
        self, args: Sequence[str | os.PathLike[str]], stderr: IO[bytes], **same: Any
    ) -> None:
        assert same == {"stdin": PIPE, "stdout": PIPE, "text": True}, same
        self.args = args
        theirs_in, ours_in = os.pipe()
        ours_out, theirs_out = os.pipe()
        self.stdin, self.stdout = os.fdopen(ours_in, "w"), os.fdopen(ours_out)
        # multiprocessing hands over the descriptors of connections.
        streams = [Connection(each) for each in (theirs_in, theirs_out, os.dup(stderr.fileno()))]
        command = [os.fspath(each) for each in args[1:]]
        self._process = SERVER.Process(target=_run, args=(command, *streams))
        self._process.start()
        for stream in streams:
            stream.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, signum: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, signum)

    def wait(self, seconds: float) -> int:
        self._process.join(seconds)
        if self.returncode is None:
            raise TimeoutError(self.args)
        return self.returncode


def _run(command: list[str], *streams: Connection) -> None:
    """Be the program: with its arguments, its standard streams and nothing else of ours."""
    for descriptor, stream in enumerate(streams):
        os.dup2(stream.fileno(), descriptor)
        stream.close()
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
