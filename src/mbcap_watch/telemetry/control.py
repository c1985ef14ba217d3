"""`Control`: stats of a bridge, for whoever connects to its socket. `ask` connects.

To connect is to ask. The answer is one JSON object, made at that moment; then the connection is
closed. Nothing is read from a client, and what the kernel does not take at once is not sent, so no
client holds up the bridge: not a slow one, not a silent one, not many. The bridge answers its own
user and root.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import sys
import time
import weakref
from typing import TYPE_CHECKING, Final

import msgspec

from mbcap_watch import __version__
from mbcap_watch.errors import QUOTED, EventLoopError, printable
from mbcap_watch.results import WatchState
from mbcap_watch.telemetry.ask import ROOT, connected, digest_of, homes, path_within, peer_of
from mbcap_watch.telemetry.metrics import Metrics
from mbcap_watch.telemetry.outputs import OutputState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from typing import Self

    from mbcap_watch.results import PersistResult, Timings
    from mbcap_watch.settings import Settings
    from mbcap_watch.telemetry.stats import Stats

# An answer takes 40 KB, and 100 KB at most.
_BUFFER_BYTES: Final = 1 << 18

# Connections that wait while the loop is busy, and what it pauses for without a descriptor.
_BACKLOG: Final = 64
_RETRY_SECONDS: Final = 1.0

_listeners: Final = weakref.WeakSet[socket.socket]()


def _close_inherited() -> None:
    for each in [*_listeners]:
        each.close()


# Else nobody would see that a parent was killed: its socket would listen on in the child.
os.register_at_fork(after_in_child=_close_inherited)


class Control:
    """Lets `mbcap-watch status`, `check` and `top` see a bridge that a program embeds.

    `run(settings, control=Control(settings))`, and likewise with `watch`, offers the stats of that
    bridge on a socket, on asyncio only, for as long as the bridge runs. One serves one bridge.

    Args:
        settings: those of the bridge.
        environ: may name a directory for the socket, as RUNTIME_DIRECTORY or XDG_RUNTIME_DIR. None:
            the environment of the process.
        embedded: whether the program does more than run the bridge.

    """

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str] | None = None,
        *,
        embedded: bool = True,
    ) -> None:
        command = " ".join([*map(os.path.basename, sys.orig_argv[:1]), *sys.orig_argv[1:]])
        program = printable(command, QUOTED) if embedded else None
        self.settings = settings
        self._metrics = Metrics(settings, version=__version__, pid=os.getpid(), program=program)
        self.outputs = self._metrics.outputs
        self._state: Callable[[], WatchState] = WatchState
        environ = os.environ if environ is None else environ
        self._socket = ControlSocket(settings, environ, self.sample)

    @contextlib.contextmanager
    def connected(self, state: Callable[[], WatchState]) -> Iterator[None]:
        """Offer stats within the context, of a bridge of which `state` tells how it watches."""
        with self._socket:
            self._state = state
            yield

    def hear(
        self,
        state: WatchState,
        result: PersistResult | None = None,
        timings: Timings | None = None,
    ) -> None:
        """Count what the bridge tells."""
        if result is not None:
            self._metrics.on_result(result)
        if timings is not None:
            self._metrics.on_timings(timings)
        self._metrics.on_state(state)
        self._socket.ensure()

    def sample(self) -> Stats:
        """Return the stats of this moment."""
        self._metrics.on_state(self._state())
        return self._metrics.snapshot(time.time())


class ControlSocket:
    """A context within which an asyncio loop answers whoever connects.

    `sample` makes the stats, in the loop, once for each answer. Where no socket can be made, that
    is logged, and the bridge works on without. Leaving it in a forked child does nothing.
    """

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str],
        sample: Callable[[], Stats],
        root: Path = ROOT,
    ) -> None:
        self._settings, self._environ, self._sample = settings, environ, sample
        self._root, self._pid = root, 0  # of the process that is within the context
        self._path, self._opened = "", contextlib.ExitStack()
        cannot = "no control socket can be made, so status and top cannot ask this process"
        self._state = OutputState(
            lambda problem: f"{cannot}: {problem}; the bridge works on without, and tries again",
            "the control socket is there: status and top can ask this process",
        )

    def __enter__(self) -> Self:
        if self._pid:
            raise RuntimeError("this Control serves a bridge already: each needs one of its own")
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError as exc:
            raise EventLoopError("a control socket works on asyncio only") from exc
        self._pid = os.getpid()
        self.ensure()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pid == os.getpid():
            self._pid, self._path = 0, ""
            self._opened.close()

    def ensure(self) -> None:
        """Make the socket if it is not there: it could not be made, or was tidied away."""
        if not self._pid or os.path.lexists(self._path):
            return
        self._path = ""
        self._opened.close()
        problems = []
        for home in dict.fromkeys(homes(self._environ, self._root)):
            try:
                self._open(home)
            except OSError as exc:
                problems.append(f"{home}: {exc.strerror or exc}")
            else:
                self._state.update()
                return
        has_proc = os.path.isdir("/proc/self/fd")  # see `path_within`
        self._state.update("; ".join(problems) if has_proc else "/proc is not mounted")

    def _open(self, home: Path) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(home, 0o700)
        with contextlib.ExitStack() as stack:
            directory = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, directory)
            status, us = os.fstat(directory), os.geteuid()
            if status.st_uid != us or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(errno.EACCES, f"others than uid {us} may write there")
            for peer, connection in connected(directory, home):
                connection.close()
                if peer.fate == "gone":  # a killed process has left it behind
                    os.unlink(peer.path.name, dir_fd=directory)
            # The final name always belongs to a socket that listens. So a refused connection
            # proves that its process is gone, and the socket may be removed.
            name = f"{digest_of(self._settings)}-{self._pid}-{os.urandom(4).hex()}.sock"
            path, temporary = (path_within(directory, each) for each in (name, f".{name}"))
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            stack.enter_context(listener)
            _listeners.add(listener)
            listener.bind(temporary)
            os.chmod(temporary, 0o600)
            listener.listen(_BACKLOG)
            os.replace(temporary, path)
            stack.enter_context(contextlib.suppress(OSError))
            stack.callback(os.unlink, path)
            self._resume(listener)
            stack.callback(self._loop.remove_reader, listener)
            self._path, self._opened = path, stack.pop_all()

    def _resume(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:  # it is not closed
            self._loop.add_reader(listener, self._answer, listener)

    def _answer(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # it has gone
        except OSError:  # no descriptor is left: the loop may not turn without a pause
            self._loop.remove_reader(listener)
            self._loop.call_later(_RETRY_SECONDS, self._resume, listener)
            return
        with client, contextlib.suppress(OSError):  # a client that has gone is no news
            client.settimeout(0)
            if peer_of(client)[1] in (0, os.geteuid()):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
                client.send(msgspec.json.encode(self._sample()))
