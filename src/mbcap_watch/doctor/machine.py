"""`check`, the machine: who has the database open, daemons, inotify's limits, the clock."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import itertools
import os
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from mbcap_watch.doctor.findings import Finding, Installation, duration, ok
from mbcap_watch.doctor.health import CLOCK_SECONDS
from mbcap_watch.doctor.places import Place, place
from mbcap_watch.settings import CONFIG_VARIABLE, DATABASE_VARIABLE, DEFAULT_DATABASE, ENV_PREFIX
from mbcap_watch.store.errors import SIDES

if TYPE_CHECKING:
    from collections.abc import Iterator

_SILENT_SECONDS: Final = 3600.0
_SCARCE_SHARE: Final = 0.9


class Daemon(NamedTuple):
    """A running `mbcap-watch run`.

    Attributes:
        database: the path of its database, as its settings name it.
        same: whether that is the database in question.
        hindered: what its own mounts, those of a unit or a container, keep it from.
        paused: whether it was stopped (SIGSTOP, a debugger).

    """

    pid: int
    uid: int
    database: str
    same: bool
    hindered: str = ""
    paused: bool = False


@dataclasses.dataclass(slots=True)
class Census:
    """The processes in `/proc` (proc(5)), as far as this user may see them.

    Attributes:
        holders: who has the database open, for people.
        strays: who has one open that was deleted or replaced.
        daemons: all running `mbcap-watch run`.
        instances: inotify instances of this user.
        watches: inotify watches of this user.

    """

    holders: set[str] = dataclasses.field(default_factory=set)
    strays: set[str] = dataclasses.field(default_factory=set)
    daemons: list[Daemon] = dataclasses.field(default_factory=list)
    instances: int = 0
    watches: int = 0


def examine(installation: Installation) -> list[Finding]:
    """Examine the processes, the limits and the clock. Blocks."""
    database = Path(installation.database)
    real = Path(os.path.realpath(database))
    statuses = [place(Path(f"{real}{side}")).status for side in ("", *SIDES)]
    newest = max((status.st_mtime for status in statuses if status), default=0.0)
    clock = list(judge_clock(installation, newest, time.time()))
    if not os.path.isdir("/proc/self"):
        return [installation.finding("no_proc"), *clock]
    file, census = place(real), Census()
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):  # it has just ended, or is somebody else's
                _count(census, int(name), file, database)
    return [
        *judge_holders(installation, census),
        judge_daemons(installation, census.daemons, os.geteuid()),
        judge_inotify(installation, "instances", census.instances, *_limit("instances")),
        judge_inotify(installation, "watches", census.watches, *_limit("watches")),
        *clock,
    ]


def daemons(database: Path) -> list[Daemon]:
    """Return every `mbcap-watch run` of this machine, as far as /proc shows them. Blocks."""
    file, found = place(Path(os.path.realpath(database))), list[Daemon]()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has just ended
            found += _daemons(int(name), file, database)
    return found


def is_paused(pid: int) -> bool:
    """Whether a process is stopped or traced."""
    return stat_of(pid)[0] in ("T", "t")


def stat_of(pid: int) -> list[str]:
    """Return what /proc/PID/stat says from the state on (proc_pid_stat(5)); "X" if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ["X"]
    return text.rpartition(")")[2].split()


def described(pid: int) -> str:
    """Return a process for people: its number and the start of its command line."""
    command = "?"
    with contextlib.suppress(OSError):
        command = " ".join(_arguments(pid))[:80]
    return f"pid {pid} ({command})"


def _arguments(pid: int) -> list[str]:
    data = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [os.fsdecode(part) for part in data.rstrip(b"\0").split(b"\0")]


def _count(census: Census, pid: int, file: Place, database: Path) -> None:
    census.daemons += _daemons(pid, file, database)
    uid = os.stat(f"/proc/{pid}").st_uid
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it was closed just now
            link = os.readlink(f"/proc/{pid}/fd/{number}")
            name = link.removesuffix(" (deleted)")
            if link == "anon_inode:inotify" and uid == os.geteuid():
                text = Path(f"/proc/{pid}/fdinfo/{number}").read_text(encoding="ascii")
                census.instances += 1
                census.watches += text.count("inotify wd:")
            elif name != link and name in (str(file.path), f"{file.path}-wal"):
                census.strays.add(described(pid))
            # By name first: to ask for the status of just any file could block. In a container the
            # directory may have another name.
            elif (
                os.path.basename(name) == file.path.name
                and file.status
                and os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), file.status)
            ):
                census.holders.add(described(pid))


def is_daemon(arguments: list[str]) -> bool:
    """Whether a command line is that of `mbcap-watch run`."""
    names = [os.path.basename(argument).replace("_", "-") for argument in arguments[:4]]
    return ("mbcap-watch", "run") in itertools.pairwise(names)


def _daemons(pid: int, file: Place, database: Path) -> Iterator[Daemon]:
    """Yield the daemon that a process is, if it is one."""
    if is_daemon(arguments := _arguments(pid)):
        uid = os.stat(f"/proc/{pid}").st_uid
        yield _daemon(pid, uid, arguments, file, database)._replace(paused=is_paused(pid))


def _daemon(pid: int, uid: int, arguments: list[str], file: Place, ours: Path) -> Daemon:
    try:
        variables = os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0")
        environ = dict(variable.partition("=")[::2] for variable in variables)
        here, root = os.readlink(f"/proc/{pid}/cwd"), f"/proc/{pid}/root"
        named = option(arguments, "--database")
        named = named or environ.get(f"{ENV_PREFIX}DATABASE") or environ.get(DATABASE_VARIABLE)
        if config := option(arguments, "--config") or environ.get(CONFIG_VARIABLE):
            text = Path(root + os.path.join(here, config)).read_text(encoding="utf-8")
            named = named or tomllib.loads(text).get("database")
        path = os.path.normpath(os.path.join(here, named or DEFAULT_DATABASE))
    except (OSError, ValueError):
        named = option(arguments, "--database")  # a command line is public
        return Daemon(pid, uid, named or "a database that only root may know", named == str(ours))
    inside = place(Path(root + path)).status  # as that process sees it, be it in a container
    if inside and file.status:
        read_only = os.statvfs(root + os.path.dirname(path)).f_flag & os.ST_RDONLY
        same = os.path.samestat(inside, file.status)
        return Daemon(pid, uid, path, same, "may only read" if read_only else "")
    return Daemon(pid, uid, path, path == str(ours), "does not see" if file.status else "")


def option(arguments: list[str], name: str) -> str | None:
    """Return the value of an option on a command line."""
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    return None


# ------------------------------------------------------------------------------ judging


def judge_holders(installation: Installation, census: Census) -> Iterator[Finding]:
    """Judge who has the database open."""
    if census.strays:
        yield installation.finding("database_replaced", who=", ".join(sorted(census.strays)))
    nobody = "nobody that this user may see; other containers cannot be seen"
    yield ok("open by", ", ".join(sorted(census.holders)) or nobody)


def judge_daemons(installation: Installation, daemons: list[Daemon], uid: int) -> Finding:
    """Judge how many daemons serve the database, and as whom."""
    here = [each for each in daemons if each.same]
    who = ", ".join(f"pid {each.pid} (user {each.uid}, {each.database})" for each in here)
    first = next(iter(here), None)
    if len(here) > 1:
        return installation.finding("two_daemons", who=who)
    if first and first.paused:
        return installation.finding("paused", pid=first.pid)
    if first and first.hindered:
        return installation.finding("hindered", who=who, hindered=first.hindered)
    if first and first.uid != uid:
        return installation.finding("other_user", who=who, uid=first.uid)
    others = [f"pid {each.pid} for {each.database}" for each in daemons if each not in here]
    return ok("daemons", ", ".join([who or "none runs for this database", *others]))


def _limit(name: str) -> tuple[int, str]:
    """Return a limit and its name: the user's, or a container's if lower (namespaces(7))."""
    limits = [(1 << 31, "none")]
    for path in (f"fs/inotify/max_user_{name}", f"user/max_inotify_{name}"):
        with contextlib.suppress(OSError):
            limit = int(Path("/proc/sys", path).read_text(encoding="ascii"))
            limits.append((limit, path.replace("/", ".")))
    return min(limits)


def judge_inotify(
    installation: Installation, name: str, used: int, limit: int, sysctl: str
) -> Finding:
    """Judge one of the kernel's limits for inotify, which are per user (inotify(7))."""
    uid = os.geteuid()
    if used < limit * _SCARCE_SHARE:
        return ok("inotify", f"user {uid} has {used:,} of {limit:,} {name}")
    about = {"used": f"{used:,}", "limit": f"{limit:,}", "name": name, "sysctl": sysctl}
    return installation.finding("inotify_limit", uid=uid, more=max(2 * limit, 512), **about)


def judge_clock(installation: Installation, newest: float, now: float) -> Iterator[Finding]:
    """Judge whether this machine's clock can be right, and the database is in use.

    Args:
        installation: whose database it is.
        newest: when the database was last written; 0 if that is not known.
        now: the time of this machine.

    """
    day = dt.datetime.fromtimestamp(now, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if newest > now + CLOCK_SECONDS:
        yield installation.finding("clock", now=day, later=duration(newest - now))
    else:
        yield ok("clock", day)
    if newest and now - newest > _SILENT_SECONDS:
        yield installation.finding("no_activity", silence=duration(now - newest))
