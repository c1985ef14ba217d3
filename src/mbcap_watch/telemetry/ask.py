"""`ask`: the stats of running daemons, from their control sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import msgspec

from mbcap_watch.telemetry.socket import (
    NAME,
    PUBLIC,
    ROOT,
    digest_of,
    homes,
    path_within,
    peer_of,
)
from mbcap_watch.telemetry.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mbcap_watch.settings import Settings

# A daemon that does not answer within so many seconds is paused, or its loop is blocked.
SILENT_SECONDS: Final = 2.0

# A longer answer is none. In a directory there is one socket for each process.
_MAX_BYTES: Final = 1 << 20
_MOST_SOCKETS: Final = 100


class Peer(NamedTuple):
    """A socket, and what came of asking.

    Attributes:
        path: where it is.
        pid: of the process that listens; if nothing does any more, of the one that did.
        uid: whose process it is.
        named: whether its name is that of the settings that were asked for.
        fate: `answered`, `silent` (for `SILENT_SECONDS`), `gone` (nothing listens), `denied` (it
            is not for this user), or `odd` (the answer is not understood).
        stats: what it answered.

    """

    path: Path
    pid: int
    uid: int
    named: bool
    fate: Literal["answered", "silent", "gone", "denied", "odd"]
    stats: Stats | None = None


def places(environ: Mapping[str, str], root: Path) -> Iterator[Path]:
    """Yield every directory that may hold the socket of a daemon, whoever has started it."""
    places = dict.fromkeys(homes(environ, root))
    for parent in ("run/user/*", *PUBLIC):
        places |= dict.fromkeys(sorted(root.glob(f"{parent}/mbcap-watch*")))
    yield from places


def ask(
    settings: Settings,
    environ: Mapping[str, str],
    root: Path = ROOT,
    *,
    everyone: bool = False,
) -> list[Peer]:
    """Ask the daemons of this machine, all at once; takes `SILENT_SECONDS` at most.

    Args:
        settings: of the daemon that is looked for.
        environ: the environment, for `RUNTIME_DIRECTORY` and `XDG_RUNTIME_DIR`.
        root: for tests.
        everyone: whether to ask those with another database, too.

    """
    deadline, digest = time.monotonic() + SILENT_SECONDS, digest_of(settings)
    start = "" if everyone else digest[: len(digest) // 2]
    with contextlib.ExitStack() as stack:
        asked = []
        for place in places(environ, root):
            # One that cannot be opened is not this user's: /proc tells of its process.
            with contextlib.suppress(OSError):
                directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, directory)
                names = [name for name in os.listdir(directory) if NAME.fullmatch(name)]
                for name in sorted(name for name in names if name.startswith(start))[
                    :_MOST_SOCKETS
                ]:
                    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    stack.callback(connection.close)
                    with contextlib.suppress(FileNotFoundError):  # it has just ended
                        asked.append((_connect(connection, place, directory, name), connection))
        peers = [_receive(peer, connection, deadline) for peer, connection in asked]
    return [peer._replace(named=peer.path.name.startswith(digest)) for peer in peers if peer]


def _connect(connection: socket.socket, place: Path, directory: int, name: str) -> Peer:
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    pid = int(name.removesuffix(".sock").partition("-")[2])
    peer = Peer(place / name, pid, status.st_uid, named=False, fate="odd")
    if not stat.S_ISSOCK(status.st_mode):
        return peer
    connection.settimeout(0)
    try:
        connection.connect(path_within(directory, name))
    except ConnectionRefusedError:
        return peer._replace(fate="gone")
    except PermissionError:
        return peer._replace(fate="denied")
    except BlockingIOError:  # too many wait already
        return peer._replace(fate="silent")
    who = peer_of(connection)
    return peer._replace(fate="answered", pid=who.pid or pid, uid=who.uid)


def _receive(peer: Peer, connection: socket.socket, deadline: float) -> Peer | None:
    """Return `peer` with its answer; None if it has just ended."""
    if peer.fate != "answered":
        return peer
    data = bytearray()
    try:
        while len(data) <= _MAX_BYTES:
            # After the deadline, what has come is still taken.
            connection.settimeout(max(deadline - time.monotonic(), 0.0))
            if not (part := connection.recv(1 << 16)):
                break
            data += part
    except (TimeoutError, BlockingIOError):
        return peer._replace(fate="silent")
    except OSError:
        return None
    if not data:
        return None
    try:
        stats = msgspec.json.decode(data, type=Stats)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return peer._replace(fate="odd")
    return peer._replace(stats=msgspec.structs.replace(stats, pid=peer.pid, uid=peer.uid))
