"""The control socket: a daemon answers whoever connects with its stats; `ask` connects.

To connect is to ask. The answer is one JSON object, made at that moment; then the connection is
closed. Nothing is read from a client, and what the kernel does not take at once is not sent, so no
client holds up the daemon: not a slow one, not a silent one, not many.

The kernel tells each side who the other one is (SO_PEERCRED, unix(7)). The daemon answers its own
user and root; clients see whose each socket is.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import socket
import stat
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import msgspec

from mbcap_watch.telemetry.outputs import OutputState
from mbcap_watch.telemetry.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Self

    from mbcap_watch.settings import Settings

    _Environ = Mapping[str, str]

ROOT: Final = Path("/")  # tests have one of their own

# Where a daemon makes a directory of its own if no environment names one.
_PUBLIC: Final = ("dev/shm", "run", "tmp")
_NAME: Final = re.compile(r"[0-9a-f]{16}-([0-9]{1,10})\.sock")

# An answer takes 40 KB, and 100 KB at most; a longer one is none.
_BUFFER_BYTES: Final = 1 << 18
_MAX_BYTES: Final = 1 << 20

# Connections that wait while the daemon is busy, and what it pauses for without a descriptor.
_BACKLOG: Final = 64
_RETRY_SECONDS: Final = 1.0

# A daemon that does not answer within so many seconds is paused, or its loop is blocked.
SILENT_SECONDS: Final = 2.0
_MOST_SOCKETS: Final = 100  # in a directory: one for each process


def homes(environ: _Environ, root: Path) -> Iterator[Path]:
    """Yield the directories in which a daemon may put its socket, the best first."""
    # systemd.exec(5): several are separated by colons. With DynamicUser= it is a link.
    runtime = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if runtime.startswith("/"):
        yield Path(runtime).resolve()
    if (user := environ.get("XDG_RUNTIME_DIR", "")).startswith("/"):
        yield Path(user, "mbcap-watch")
    for place in _PUBLIC:
        yield root / place / f"mbcap-watch-{os.geteuid()}"


def places(environ: _Environ, root: Path) -> list[Path]:
    """Return every directory that may hold the socket of a daemon, whoever has started it."""
    parents = ("run/user/*", *_PUBLIC)
    found = [each for parent in parents for each in sorted(root.glob(f"{parent}/mbcap-watch*"))]
    return list(dict.fromkeys([*homes(environ, root), *found]))


def digest_of(settings: Settings) -> str:
    """Return what the names of all sockets for these settings begin with.

    The first half is for the database, the other one for the snapshot directory.
    """
    paths = settings.database, settings.snapshot_dir
    return "".join(hashlib.blake2b(os.fsencode(each), digest_size=4).hexdigest() for each in paths)


def _path_within(directory: int, name: str) -> str:
    """Return a path of a file in an open directory; a socket's may have 107 bytes at most."""
    return f"/proc/self/fd/{directory}/{name}"


def _peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of who is at the other end; pid 0 if it is not to be seen here."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", found)
    return pid, uid


# ------------------------------------------------------------------------------ the daemon


class ControlSocket:
    """A context within which an asyncio loop answers whoever connects.

    A host that embeds the bridge can use it as `cli/run` does. `sample` makes the stats, in the
    loop, once for each answer. Where no socket can be made, that is logged, and the bridge works on
    without.
    """

    def __init__(
        self, settings: Settings, environ: _Environ, sample: Callable[[], Stats], root: Path = ROOT
    ) -> None:
        self._environ, self._sample, self._root = environ, sample, root
        self._name = f"{digest_of(settings)}-{os.getpid()}.sock"
        self._path, self._opened = "", contextlib.ExitStack()
        cannot = "no control socket can be made, so status and top cannot ask this process"
        self._state = OutputState(
            lambda problem: f"{cannot}: {problem}; the bridge works on without, and tries again",
            "the control socket is there: status and top can ask this process",
        )

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self.ensure()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def ensure(self) -> None:
        """Make the socket if it is not there: it could not be made, or was tidied away."""
        if os.path.lexists(self._path):
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
        has_proc = os.path.isdir("/proc/self/fd")  # see `_path_within`
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
            for peer, connection in _connected(directory, home):
                connection.close()
                if peer.fate == "gone":  # a killed daemon has left it behind
                    os.unlink(peer.path.name, dir_fd=directory)
            # The final name always belongs to a socket that listens. So a refused connection
            # proves that its daemon is gone, and the socket may be removed.
            path = _path_within(directory, self._name)
            temporary = _path_within(directory, f".{self._name}")
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            stack.enter_context(listener)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
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
            if _peer_of(client)[1] in (0, os.geteuid()):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
                client.send(msgspec.json.encode(self._sample()))


# ------------------------------------------------------------------------------ who asks


class Peer(NamedTuple):
    """A socket, and what came of asking.

    Attributes:
        path: where it is.
        pid: of the process that listens, or that did; `uid` whose it is.
        named: whether its name is that of the settings that were asked for.
        fate: `answered`, `silent` (for `SILENT_SECONDS`), `gone` (nothing listens), `denied` (it
            is not for this user), or `odd` (the answer is not understood).
        stats: what it answered.

    """

    path: Path
    pid: int
    uid: int
    named: bool = False
    fate: Literal["answered", "silent", "gone", "denied", "odd"] = "odd"
    stats: Stats | None = None


def ask(
    settings: Settings, environ: _Environ, root: Path = ROOT, *, everyone: bool = False
) -> list[Peer]:
    """Ask the daemons with this database, or `everyone`; takes `SILENT_SECONDS` at most."""
    deadline, digest = time.monotonic() + SILENT_SECONDS, digest_of(settings)
    start = "" if everyone else digest[: len(digest) // 2]
    asked = []
    with contextlib.ExitStack() as stack:
        for place in places(environ, root):
            # One that cannot be opened is not this user's: /proc tells of its process.
            with contextlib.suppress(OSError):
                directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, directory)
                for peer, connection in _connected(directory, place, start):
                    stack.enter_context(connection)
                    asked.append((peer, connection))
        peers = [_receive(peer, connection, deadline) for peer, connection in asked]
    return [peer._replace(named=peer.path.name.startswith(digest)) for peer in peers if peer]


def _connected(
    directory: int, place: Path, start: str = ""
) -> Iterator[tuple[Peer, socket.socket]]:
    """Connect to the sockets in a directory whose names begin so; yield what came of it."""
    names = sorted(name for name in os.listdir(directory) if name.startswith(start))
    for match in [*filter(None, map(_NAME.fullmatch, names))][:_MOST_SOCKETS]:
        connection = socket.socket(socket.AF_UNIX)
        try:
            status = os.stat(match[0], dir_fd=directory, follow_symlinks=False)
            peer = Peer(place / match[0], int(match[1]), status.st_uid)
            if stat.S_ISSOCK(status.st_mode):
                peer = _connect(connection, peer, _path_within(directory, match[0]))
        except OSError:  # it has just ended
            connection.close()
        else:
            yield peer, connection


def _connect(connection: socket.socket, peer: Peer, path: str) -> Peer:
    connection.settimeout(0)
    try:
        connection.connect(path)
    except ConnectionRefusedError:
        return peer._replace(fate="gone")
    except PermissionError:
        return peer._replace(fate="denied")
    except BlockingIOError:  # too many wait already
        return peer._replace(fate="silent")
    pid, uid = _peer_of(connection)
    return peer._replace(fate="answered", pid=pid or peer.pid, uid=uid)


def _receive(peer: Peer, connection: socket.socket, deadline: float) -> Peer | None:
    """Return `peer` with its answer; None if it has just ended."""
    if peer.fate != "answered":
        return peer
    data = bytearray()
    try:
        # After the deadline, what has come is still taken.
        while len(data) <= _MAX_BYTES:
            connection.settimeout(max(deadline - time.monotonic(), 0.0))
            if not (part := connection.recv(1 << 16)):
                break
            data += part
        if not data:
            return None
        stats = msgspec.json.decode(data, type=Stats)
    except (TimeoutError, BlockingIOError):
        return peer._replace(fate="silent")
    except OSError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return peer._replace(fate="odd")
    return peer._replace(stats=msgspec.structs.replace(stats, pid=peer.pid, uid=peer.uid))
