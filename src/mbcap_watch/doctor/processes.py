"""Processes: who has the database open or locked, and which daemons run, by /proc and F_GETLK."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import struct
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from mbcap_watch.doctor.findings import Finding, Installation, duration, ok
from mbcap_watch.doctor.places import Place, place
from mbcap_watch.settings import CONFIG_VARIABLE, DATABASE_VARIABLE, DEFAULT_DATABASE, ENV_PREFIX
from mbcap_watch.store.errors import SIDES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SILENT_SECONDS: Final = 3600.0

# For how long a lock is watched.
LOCK_SECONDS: Final = 2.0

# The bytes that stand for a lock: in -shm the writer's and the readers' (sqlite.org/
# walformat.html, "WAL Locks"); in the database PENDING, RESERVED and SHARED (SQLite's os.h).
_WAL_WRITER: Final = (120, 1)
WAL_READERS: Final = (123, 5)
_DATABASE_LOCKS: Final = (0x40000000, 512)
_FLOCK: Final = "hhqqi4x"  # struct flock: type, whence, start, length, pid


def examine(here: Installation) -> Iterator[Finding]:
    """Examine who has the database open, and whether anybody writes it. Blocks."""
    real = Path(os.path.realpath(here.database))
    file, statuses = place(real), [place(Path(f"{real}{side}")).status for side in ("", *SIDES)]
    silence = time.time() - max((each.st_mtime for each in statuses if each), default=time.time())
    if silence > _SILENT_SECONDS:
        yield here.finding("no_activity", silence=duration(silence))
    if not os.path.isdir("/proc/self"):
        yield here.finding("no_proc")
        return
    holders, strays = set[str](), set[str]()
    for pid in _processes():
        with contextlib.suppress(OSError):  # it has just ended, or is somebody else's
            for number in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):  # it was closed just now
                    _sort(pid, f"/proc/{pid}/fd/{number}", file, holders, strays)
    if strays:
        yield here.finding("database_replaced", who=", ".join(sorted(strays)))
    nobody = "nobody that this user may see; other containers cannot be seen"
    yield ok("open by", ", ".join(sorted(holders)) or nobody)


def _sort(pid: int, descriptor: str, file: Place, holders: set[str], strays: set[str]) -> None:
    """Note a process that has the database open, or one that was deleted or replaced."""
    link = os.readlink(descriptor)
    name = link.removesuffix(" (deleted)")
    if name != link and name in (str(file.path), f"{file.path}-wal"):
        strays.add(described(pid))
    # By name first: to ask for the status of just any file could block. In a container the
    # directory may have another name.
    elif (
        os.path.basename(name) == file.path.name
        and file.status
        and os.path.samestat(os.stat(descriptor), file.status)
    ):
        holders.add(described(pid))


def _processes() -> list[int]:
    return [
        int(name) for name in os.listdir("/proc") if name.isdigit() and name != str(os.getpid())
    ]


def described(pid: int) -> str:
    """Return a process for people: its number and the start of its command line."""
    command = "?"
    with contextlib.suppress(OSError):
        command = " ".join(_arguments(pid))[:80]
    return f"pid {pid} ({command})"


def _arguments(pid: int) -> list[str]:
    data = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [os.fsdecode(part) for part in data.rstrip(b"\0").split(b"\0")]


def stat_of(pid: int) -> list[str]:
    """Return what /proc/PID/stat says from the state on (proc_pid_stat(5)); "X" if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ["X"]
    return text.rpartition(")")[2].split()


def is_paused(pid: int) -> bool:
    """Whether a process is stopped or traced."""
    return stat_of(pid)[0] in ("T", "t")


# ------------------------------------------------------------------------------ daemons


class Daemon(NamedTuple):
    """A running `mbcap-watch run`, its database, and whether that is the one in question."""

    pid: int
    uid: int
    database: str
    same: bool


def daemons(database: Path) -> list[Daemon]:
    """Return every `mbcap-watch run` of this machine, as far as /proc shows them. Blocks."""
    file, found = place(Path(os.path.realpath(database))), list[Daemon]()
    for pid in _processes():
        with contextlib.suppress(OSError):  # it has just ended
            if is_daemon(arguments := _arguments(pid)):
                uid = os.stat(f"/proc/{pid}").st_uid
                found.append(_daemon(pid, uid, arguments, file, database))
    return found


def is_daemon(arguments: list[str]) -> bool:
    """Whether a command line is that of `mbcap-watch run`."""
    names = [os.path.basename(argument).replace("_", "-") for argument in arguments[:4]]
    return ("mbcap-watch", "run") in itertools.pairwise(names)


def _daemon(pid: int, uid: int, arguments: list[str], file: Place, ours: Path) -> Daemon:
    named = _option(arguments, "--database")  # a command line is public
    try:
        variables = os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0")
        environ = dict(variable.partition("=")[::2] for variable in variables)
        here, root = os.readlink(f"/proc/{pid}/cwd"), f"/proc/{pid}/root"
        path = named or environ.get(f"{ENV_PREFIX}DATABASE") or environ.get(DATABASE_VARIABLE)
        if config := _option(arguments, "--config") or environ.get(CONFIG_VARIABLE):
            text = Path(root + os.path.join(here, config)).read_text(encoding="utf-8")
            path = path or tomllib.loads(text).get("database")
        path = os.path.normpath(os.path.join(here, path or DEFAULT_DATABASE))
    except (OSError, ValueError):
        return Daemon(pid, uid, named or "a database that only root may know", named == str(ours))
    inside = place(Path(root + path)).status  # as that process sees it, be it in a container
    if inside and file.status:
        return Daemon(pid, uid, path, os.path.samestat(inside, file.status))
    return Daemon(pid, uid, path, path == str(ours))


def _option(arguments: list[str], name: str) -> str | None:
    for word, following in itertools.pairwise([*arguments, ""]):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    return None


# ------------------------------------------------------------------------------ locks


def judge_lock(here: Installation, real: Path, *, wal: bool) -> Finding:
    """Judge who holds the write lock, if anybody does; the kernel says it (F_GETLK, fcntl(2))."""
    locks = {real: _DATABASE_LOCKS} | ({Path(f"{real}-shm"): _WAL_WRITER} if wal else {})
    if hidden := [str(path) for path in locks if path.exists() and not place(path).readable]:
        return ok("lock", f"not known: {', '.join(hidden)} may not be read")
    who = holder(locks, fcntl.F_RDLCK)  # only what is locked for writing is in its way
    if not who:
        return ok("lock", "the write lock is free")
    text = f"the database has been locked for {duration(LOCK_SECONDS)} or more by {who}"
    remedy = "end the transaction that it keeps open (a shell, a backup, a stuck ingestor), or"
    remedy += " restart it; nothing is lost meanwhile"
    return here.finding("busy", text, remedy=remedy)


def holder(locks: Mapping[Path, tuple[int, int]], against: int) -> str:
    """Return who has one of the locks for `LOCK_SECONDS` on end; "" if they are free meanwhile."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        pids = [_held(path, *span, against) for path, span in locks.items()]
        pid = next((pid for pid in pids if pid is not None), None)
        if pid is None:
            return ""
        if time.monotonic() > deadline:
            return described(pid) if pid > 0 else "a process in another container"
        time.sleep(0.02)


def _held(path: Path, start: int, length: int, against: int) -> int | None:
    """Return whose lock is in the way of one of the kind `against`, without taking it."""
    asked = struct.pack(_FLOCK, against, os.SEEK_SET, start, length, 0)
    try:
        with open(path, "rb") as file:
            kind, *_, pid = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except OSError:
        return None  # there is none, or `not_permitted` was reported
    return None if kind == fcntl.F_UNLCK else pid
