"""The control socket: a daemon answers with its stats whoever connects.

To connect is to ask. The answer is one JSON object, made at that moment; then the connection is
closed. Nothing is read from a client, and what the kernel does not take at once is not sent, so no
client holds up the daemon: not a slow one, not a silent one, not many.

The kernel tells each side who the other one is (SO_PEERCRED, unix(7)). The daemon answers its own
user and root; clients (`ask`) see whose each socket is.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import re
import socket
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from mbcap_watch.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Self

    from mbcap_watch.settings import Settings
    from mbcap_watch.telemetry.stats import Stats

logger = logging.getLogger("mbcap_watch")

ROOT: Final = Path("/")  # tests have one of their own

# An answer takes 40 KB, and 100 KB at most.
_BUFFER_BYTES: Final = 1 << 18

# Connections that wait while the daemon is busy, and what it pauses for without a descriptor.
_BACKLOG: Final = 64
_RETRY_SECONDS: Final = 1.0

# Where a daemon makes a directory of its own if no environment names one.
PUBLIC: Final = ("dev/shm", "run", "tmp")

NAME: Final = re.compile(r"([0-9a-f]{16})-([0-9]{1,10})\.sock")
_OTHERS_MAY_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def homes(environ: Mapping[str, str], root: Path) -> Iterator[Path]:
    """Yield the directories in which a daemon may put its socket, the best first."""
    # systemd.exec(5): several are separated by colons. With DynamicUser= it is a link.
    runtime = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if runtime.startswith("/"):
        yield Path(runtime).resolve()
    if (user := environ.get("XDG_RUNTIME_DIR", "")).startswith("/"):
        yield Path(user, "mbcap-watch")
    for place in PUBLIC:
        yield root / place / f"mbcap-watch-{os.geteuid()}"


def digest_of(settings: Settings) -> str:
    """Return what the names of all sockets for these settings begin with.

    Its first half is for the database, the other one for the snapshot directory.
    """
    paths = settings.database, settings.snapshot_dir
    return "".join(hashlib.blake2b(os.fsencode(each), digest_size=4).hexdigest() for each in paths)


def path_within(directory: int, name: str) -> str:
    """Return a path of a file in an open directory; a socket's may have 107 bytes at most."""
    return f"/proc/self/fd/{directory}/{name}"


class Credentials(NamedTuple):
    """Who a process is."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Credentials:
    """Return who is at the other end, by the kernel's word; pid 0 if it is not to be seen here."""
    layout = struct.Struct("3i")
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    return Credentials(*layout.unpack(found))


# ------------------------------------------------------------------------------ the daemon


class ControlSocket:
    """A context within which an asyncio loop answers whoever connects.

    A host that embeds the bridge can use it as `run` does:

        metrics = Metrics(settings, version=..., pid=os.getpid())
        with ControlSocket(settings, os.environ, lambda: metrics.snapshot(time.time())):
            await run(settings, on_result=metrics.on_result, on_state=metrics.on_state)

    Where no socket can be made, that is logged, and the bridge works on without.

    Args:
        settings: of the bridge.
        environ: the environment, for `RUNTIME_DIRECTORY` and `XDG_RUNTIME_DIR`.
        sample: makes the stats; called in the loop, once for each answer.
        root: for tests.

    """

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str],
        sample: Callable[[], Stats],
        root: Path = ROOT,
    ) -> None:
        self._environ, self._sample, self._root = environ, sample, root
        self._digest = digest_of(settings)
        self._name = f"{self._digest}-{os.getpid()}.sock"
        self._directory: int | None = None
        self._listener: socket.socket | None = None
        self._problem: str | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self.keep()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def keep(self) -> None:
        """Make the socket anew if it is not there: it could not be made, or was tidied away."""
        if self._directory is not None:
            with contextlib.suppress(OSError):
                os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
                return
        self._close()
        problems = []
        for home in dict.fromkeys(homes(self._environ, self._root)):
            try:
                self._open(home)
            except OSError as exc:
                problems.append(f"{home}: {exc.strerror or exc}")
                self._close()
            else:
                self._note(None)
                return
        self._note("; ".join(problems))

    def _open(self, home: Path) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(home, 0o700)
        directory = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._directory = directory
        status = os.fstat(directory)
        if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_MAY_WRITE:
            raise PermissionError(errno.EACCES, f"others than uid {os.geteuid()} may write there")
        self._remove_leftovers(directory)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener = listener
        # The final name always belongs to a socket that listens. So a refused connection proves
        # that its daemon is gone, and the socket may be removed.
        temporary = f".{self._name}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        listener.bind(path_within(directory, temporary))
        os.chmod(temporary, 0o600, dir_fd=directory)
        listener.listen(_BACKLOG)
        os.replace(temporary, self._name, src_dir_fd=directory, dst_dir_fd=directory)
        self._loop.add_reader(listener, self._answer, listener)

    def _remove_leftovers(self, directory: int) -> None:
        """Remove the sockets that killed daemons left behind."""
        for name in os.listdir(directory):
            if NAME.fullmatch(name):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                    probe.settimeout(0)
                    try:
                        probe.connect(path_within(directory, name))
                    except ConnectionRefusedError:
                        os.unlink(name, dir_fd=directory)
                    except OSError:
                        continue  # it is busy, or has just ended

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
            if peer_of(client).uid in (0, os.geteuid()):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
                client.send(msgspec.json.encode(self._sample()))

    def _resume(self, listener: socket.socket) -> None:
        if listener is self._listener:
            self._loop.add_reader(listener, self._answer, listener)

    def _close(self) -> None:
        if self._directory is not None:
            if self._listener is not None:
                with contextlib.suppress(OSError):
                    os.unlink(self._name, dir_fd=self._directory)
            os.close(self._directory)
            self._directory = None
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _note(self, problem: str | None) -> None:
        """Log what is new about `problem`."""
        before, self._problem = self._problem, problem
        if problem is not None and problem != before:
            logger.warning(
                "no control socket can be made, so status and top cannot ask this process: %s; the"
                " bridge works on without, and tries again",
                printable(problem),
            )
        elif problem is None and before is not None:
            logger.info("the control socket is there: status and top can ask this process")
