"""`check`, the machine: who has the database, other daemons, inotify's limits, the clock."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import itertools
import os
import shlex
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from mbcap_watch.cli.config import CONFIG_VARIABLE, DATABASE_VARIABLE, DEFAULT_DATABASE, ENV_PREFIX
from mbcap_watch.doctor.database import SIDES, place
from mbcap_watch.doctor.findings import Finding, duration, ok, problem, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mbcap_watch.doctor.database import Place

CLOCK_SECONDS: Final = 60.0
_SILENT_SECONDS: Final = 3600.0
_SCARCE_SHARE: Final = 0.9


class Daemon(NamedTuple):
    """A running `mbcap-watch run`.

    Attributes:
        database: what it serves, as it calls it.
        same: whether that is the database in question.
        hindered: what its own mounts, those of a unit or a container, do to that.
        paused: whether it was stopped (SIGSTOP, a debugger), and does nothing.

    """

    pid: int
    uid: int
    database: str
    same: bool
    hindered: str = ""
    paused: bool = False


@dataclasses.dataclass(slots=True)
class Census:
    """What `/proc` says (proc(5)), as far as this user may know.

    Attributes:
        holders: who has the database open, for people.
        strays: who has one open that was deleted or replaced.
        daemons: all of ours.
        instances: of inotify, that this user has.
        watches: likewise.

    """

    holders: set[str] = dataclasses.field(default_factory=set)
    strays: set[str] = dataclasses.field(default_factory=set)
    daemons: list[Daemon] = dataclasses.field(default_factory=list)
    instances: int = 0
    watches: int = 0


def examine(database: Path) -> list[Finding]:
    """Look through the processes, the limits and the clock. Blocks."""
    real = Path(os.path.realpath(database))
    file, census = place(real), Census()
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):  # it has just ended, or is somebody else's
                _count(census, int(name), file, database)
    statuses = [place(Path(f"{real}{side}")).status for side in ("", *SIDES)]
    newest = max((status.st_mtime for status in statuses if status), default=0.0)
    return [
        *judge_holders(census),
        judge_daemons(census.daemons, database, os.geteuid()),
        judge_inotify("instances", census.instances, *_limit("instances")),
        judge_inotify("watches", census.watches, *_limit("watches")),
        *judge_clock(newest, time.time()),
    ]


def daemons(database: Path) -> list[Daemon]:
    """Return every `mbcap-watch run` of this machine, as far as /proc shows them. Blocks."""
    file, found = place(Path(os.path.realpath(database))), []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has just ended
            if is_daemon(arguments := _arguments(int(name))):
                uid = os.stat(f"/proc/{name}").st_uid
                each = _daemon(int(name), uid, arguments, file, database)
                found.append(each._replace(paused=is_paused(each.pid)))
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


def command_of(pid: int) -> str:
    """Return the command line of a process, as far as it tells processes apart."""
    with contextlib.suppress(OSError):
        return " ".join(_arguments(pid))[:80]
    return "?"


def _arguments(pid: int) -> list[str]:
    data = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [os.fsdecode(part) for part in data.rstrip(b"\0").split(b"\0")]


def _count(census: Census, pid: int, file: Place, database: Path) -> None:
    arguments, uid = _arguments(pid), os.stat(f"/proc/{pid}").st_uid
    if is_daemon(arguments):
        each = _daemon(pid, uid, arguments, file, database)
        census.daemons.append(each._replace(paused=is_paused(pid)))
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it was closed just now
            link = os.readlink(f"/proc/{pid}/fd/{number}")
            name = link.removesuffix(" (deleted)")
            if link == "anon_inode:inotify" and uid == os.geteuid():
                text = Path(f"/proc/{pid}/fdinfo/{number}").read_text(encoding="ascii")
                census.instances += 1
                census.watches += text.count("inotify wd:")
            elif name != link and name in (str(file.path), f"{file.path}-wal"):
                census.strays.add(f"pid {pid} ({command_of(pid)})")
            # By name first: to ask for the status of just any file could block. In a container the
            # directory may have another name.
            elif (
                os.path.basename(name) == file.path.name
                and file.status
                and os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), file.status)
            ):
                census.holders.add(f"pid {pid} ({command_of(pid)})")


def is_daemon(arguments: list[str]) -> bool:
    """Whether a command line is that of `mbcap-watch run`."""
    names = [os.path.basename(argument).replace("_", "-") for argument in arguments[:4]]
    return ("mbcap-watch", "run") in itertools.pairwise(names)


def _daemon(pid: int, uid: int, arguments: list[str], file: Place, ours: Path) -> Daemon:
    try:
        variables = os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0")
        environ = dict(variable.partition("=")[::2] for variable in variables)
        here, root = os.readlink(f"/proc/{pid}/cwd"), f"/proc/{pid}/root"
        told = option(arguments, "--database")
        told = told or environ.get(f"{ENV_PREFIX}DATABASE") or environ.get(DATABASE_VARIABLE)
        if config := option(arguments, "--config") or environ.get(CONFIG_VARIABLE):
            text = Path(root + os.path.join(here, config)).read_text(encoding="utf-8")
            told = told or tomllib.loads(text).get("database")
        path = os.path.normpath(os.path.join(here, told or DEFAULT_DATABASE))
    except (OSError, ValueError):
        told = option(arguments, "--database")  # which everybody may know
        return Daemon(pid, uid, told or "a database that only root may know", told == str(ours))
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


def judge_holders(census: Census) -> Iterator[Finding]:
    """Judge who has the database open."""
    for who in sorted(census.strays):
        text = f"{who} has a database or -wal open that was deleted or replaced: what it writes"
        remedy = "restart it; stop everything before replacing a database, and keep -wal with it"
        yield problem("open by", f"{text} is lost", remedy)
    nobody = "nobody that this user may see; other containers cannot be seen"
    yield ok("open by", ", ".join(sorted(census.holders)) or nobody)


def judge_daemons(daemons: list[Daemon], database: Path, uid: int) -> Finding:
    """Judge how many of ours run, and as whom."""
    here = [each for each in daemons if each.same]
    who = ", ".join(f"pid {each.pid} (user {each.uid}, {each.database})" for each in here)
    if len(here) > 1:
        remedy = f"stop all but one (systemctl stop UNIT, or kill {here[-1].pid}): they wait for"
        remedy += " each other's locks, and settings of one are undone by the other"
        return problem("daemons", f"{len(here)} serve this database: {who}", remedy)
    if here and here[0].paused:
        remedy = f"let it go on: kill -CONT {here[0].pid}"
        return problem("daemons", f"it is paused, and does nothing: {who}", remedy)
    if here and here[0].hindered:
        remedy = f"systemctl edit its unit, then restart it: ReadWritePaths={database.parent}, and"
        remedy += " no ProtectHome= or PrivateTmp= that hides it; in a container, mount it (not ro)"
        text = f"{who} {here[0].hindered} the database where it runs, although it is there"
        return problem("daemons", text, remedy)
    if here and here[0].uid != uid:
        remedy = f"to see what that user may do: sudo -u '#{here[0].uid}' mbcap-watch check"
        remedy += f" --database {shlex.quote(str(database))}"
        return warning("daemons", f"it runs as another user than this check: {who}", remedy)
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


def judge_inotify(name: str, used: int, limit: int, sysctl: str) -> Finding:
    """Judge one of the kernel's limits for inotify, which are per user (inotify(7))."""
    text = f"user {os.geteuid()} has {used:,} of {limit:,} {name}"
    if used < limit * _SCARCE_SHARE:
        return ok("inotify", text)
    remedy = f"as root: sysctl -w {sysctl}={max(2 * limit, 512)}, and in /etc/sysctl.d; without a"
    remedy += " watch mbcap-watch polls"
    return warning("inotify", text, remedy)


def judge_clock(newest: float, now: float) -> Iterator[Finding]:
    """Whether this machine's clock can be right, and the database is in use.

    Args:
        newest: when the database was last written; 0 if that is not known.
        now: this machine's clock.

    """
    day = dt.datetime.fromtimestamp(now, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    remedy = "as root: timedatectl set-ntp true; see timedatectl timesync-status"
    if newest > now + CLOCK_SECONDS:
        text = (
            f"it is {day}, but the database was written {duration(newest - now)} later: it jumped"
        )
        yield warning("clock", text, remedy)
    else:
        yield ok("clock", day)
    if newest and now - newest > _SILENT_SECONDS:
        text = f"nothing has been written to the database for {duration(now - newest)}"
        remedy = "is CoreScope's ingestor running, and is this its database, not an old copy?"
        yield warning("activity", text, remedy)
