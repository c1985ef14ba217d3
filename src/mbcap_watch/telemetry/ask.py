"""Where the control sockets are, and asking them: `ask`. `control` has the bridge's end.

The kernel tells each side who the other one is (SO_PEERCRED, unix(7)): clients see whose each
socket is.
"""

from __future__ import annotations

import contextlib
import glob
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

from mbcap_watch.telemetry.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mbcap_watch.settings import Settings

    _Environ = Mapping[str, str]

ROOT: Final = Path("/")  # tests have one of their own

# Where a bridge makes a directory of its own if no environment names one.
_PUBLIC: Final = ("dev/shm", "run", "tmp")
_NAME: Final = re.compile(r"[0-9a-f]{16}-([0-9]{1,10})-[0-9a-f]{8}\.sock")

# An answer takes 40 KB, and 100 KB at most; a longer one is none.
_MAX_BYTES: Final = 1 << 20

# A process that does not answer within so many seconds is paused, or its loop is blocked.
SILENT_SECONDS: Final = 2.0
_MOST_SOCKETS: Final = 100  # in a directory: one for each bridge


def homes(environ: _Environ, root: Path) -> Iterator[Path]:
    """Yield the directories in which a bridge may put its socket, the best first."""
    # systemd.exec(5): several are separated by colons. With DynamicUser= it is a link.
    runtime = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if runtime.startswith("/"):
        home = Path(runtime).resolve()
        # The directory of a program that embeds the bridge has its name; `places` looks for ours.
        yield home if home.name.startswith("mbcap-watch") else home / "mbcap-watch"
    if (user := environ.get("XDG_RUNTIME_DIR", "")).startswith("/"):
        yield Path(user, "mbcap-watch")
    for place in _PUBLIC:
        yield root / place / f"mbcap-watch-{os.geteuid()}"


def places(environ: _Environ, root: Path) -> list[Path]:
    """Return every directory that may hold the socket of a bridge, whoever has started it."""
    parents = ("run/user/*", "run/*", *_PUBLIC)
    # Unlike Path.glob before Python 3.12, it passes by what cannot be listed, as a dead FUSE mount.
    found = [glob.glob(f"{parent}/mbcap-watch*", root_dir=root) for parent in parents]
    paths = [root / each for some in found for each in sorted(some)]
    return list(dict.fromkeys([*homes(environ, root), *paths]))


def digest_of(settings: Settings) -> str:
    """Return what the names of all sockets for these settings begin with.

    The first half is for the database, the other one for the snapshot directory. The pid follows,
    and a number that no other bridge of the process has.
    """
    paths = settings.database, settings.snapshot_dir
    return "".join(hashlib.blake2b(os.fsencode(each), digest_size=4).hexdigest() for each in paths)


def path_within(directory: int, name: str) -> str:
    """Return a path of a file in an open directory; a socket's may have 107 bytes at most."""
    return f"/proc/self/fd/{directory}/{name}"


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of who is at the other end; pid 0 if it is not to be seen here."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", found)
    return pid, uid


class Peer(NamedTuple):
    """A socket, and what came of asking.

    Attributes:
        path: where it is.
        pid: of the process that listens, or that did; 0 if it runs where only others see it, in
            another container. `uid`: whose it is.
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


def ask(settings: Settings, environ: _Environ, root: Path = ROOT) -> list[Peer]:
    """Ask every bridge, those with these settings first; takes `SILENT_SECONDS` at most."""
    deadline, digest = time.monotonic() + SILENT_SECONDS, digest_of(settings)
    asked = []
    with contextlib.ExitStack() as stack:
        for place in places(environ, root):
            # One that cannot be opened is not this user's: /proc tells of its process.
            with contextlib.suppress(OSError):
                directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, directory)
                for peer, connection in connected(directory, place, digest):
                    stack.enter_context(connection)
                    asked.append((peer, connection))
        peers = [_receive(peer, connection, deadline) for peer, connection in asked]
    # A directory may have two paths.
    return [*{(peer.pid, peer.uid, peer.path.name): peer for peer in peers if peer}.values()]


def connected(directory: int, place: Path, named: str = "") -> Iterator[tuple[Peer, socket.socket]]:
    """Connect to the sockets in a directory, first to those that are `named` so; yield each."""
    names = sorted(os.listdir(directory), key=lambda name: (not name.startswith(named), name))
    for match in [*filter(None, map(_NAME.fullmatch, names))][:_MOST_SOCKETS]:
        connection = socket.socket(socket.AF_UNIX)
        try:
            status = os.stat(match[0], dir_fd=directory, follow_symlinks=False)
            is_named = match[0].startswith(named)
            peer = Peer(place / match[0], int(match[1]), status.st_uid, is_named)
            if stat.S_ISSOCK(status.st_mode):
                peer = _connect(connection, peer, path_within(directory, match[0]))
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
    pid, uid = peer_of(connection)
    return peer._replace(fate="answered", pid=pid, uid=uid)


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
    return peer._replace(
        stats=msgspec.structs.replace(stats, pid=peer.pid or stats.pid, uid=peer.uid)
    )
