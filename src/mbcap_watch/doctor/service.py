"""The running bridge: `look` asks it, or looks for a daemon in /proc, and judges."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from mbcap_watch.doctor import machine
from mbcap_watch.doctor.findings import Finding, Installation, ago, duration
from mbcap_watch.doctor.health import Health, judge
from mbcap_watch.doctor.machine import Place, cut_off, place
from mbcap_watch.errors import QUOTED, printable
from mbcap_watch.settings import (
    CONFIG_FILE,
    CONFIG_VARIABLE,
    DATABASE_VARIABLE,
    DEFAULT_DATABASE,
    ENV_PREFIX,
)
from mbcap_watch.telemetry.ask import SILENT_SECONDS, ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mbcap_watch.settings import Settings
    from mbcap_watch.telemetry.ask import Peer
    from mbcap_watch.telemetry.stats import Stats

T = TypeVar("T")

# A daemon makes its socket within a second of its start, and removes it less than a second before
# its end. So one without a socket is looked at again, and is starting while it is young: on a
# machine that is very busy, a start takes more than ten seconds.
_AGAIN_SECONDS: Final = 0.25
_TRIES: Final = 4
_YOUNG_SECONDS: Final = 30.0

# Bridges that are named of many with one database.
_MOST_NAMED: Final = 8

# For how long files are asked for what they are; a mount whose server is gone never answers.
_FILE_SECONDS: Final = 1.0

# What is missing where a directory was deleted behind its mount.
_DELETED: Final = {"database_missing", "no_database", "no_snapshot", "snapshot_vanished"}


def look(
    settings: Settings,
    environ: Mapping[str, str],
    max_age: float | None = None,
    config: str | Path | None = None,
) -> tuple[Stats | None, Health]:
    """Ask the bridge with these settings for its stats, and judge. Takes a few seconds at most.

    Of several, a healthy one is preferred, and all are named. `config` is the file that the
    settings are from, for the commands in remedies.
    """
    here, tries, everyone = Installation.of(settings, config), _TRIES, False
    while True:
        peers = ask(settings, environ, everyone=everyone)
        trusted = trusted_users(here, peers)
        same = [peer for peer in peers if _is_for(peer, here) and peer.uid in trusted]
        if answered := [peer.stats for peer in same if peer.stats is not None]:
            known = [peer.stats for peer in peers if peer.stats and peer.uid in trusted]
            return _judge_answers(here, answered, known, max_age)
        if silent := [peer for peer in same if peer.fate == "silent"]:
            return None, _judge_silent(here, silent[0])
        if not everyone:
            everyone = True
            continue
        pids = {peer.pid for peer in peers if peer.stats is not None}
        found = _within(lambda: daemons(settings.database), list[Daemon]())
        unasked = [each for each in found if each.same and each.pid not in pids]
        tries -= 1
        if not unasked or not tries:
            break
        time.sleep(_AGAIN_SECONDS)
    return None, _judge_unanswered(here, peers, same, found, unasked, trusted)


def trusted_users(here: Installation, peers: Sequence[Peer]) -> set[int]:
    """Return the users whose sockets are believed; for root, the database's owner is among them."""
    uids = {0, os.geteuid()}
    if os.geteuid() == 0 and any(peer.uid for peer in peers):
        uids.add(_within(lambda: os.stat(here.database).st_uid, 0))
    return uids


def _within(function: Callable[[], T], otherwise: T) -> T:
    """Call a function that touches files; return `otherwise` if it fails or takes long."""
    answer = [otherwise]

    def run() -> None:
        with contextlib.suppress(OSError):
            answer[0] = function()

    thread = threading.Thread(target=run, daemon=True)
    with contextlib.suppress(RuntimeError):  # there is no thread for it
        thread.start()
        thread.join(_FILE_SECONDS)
    return answer[0]


def _is_for(peer: Peer, here: Installation) -> bool:
    """Whether a socket is of a daemon with these settings: by its own word, else by its name."""
    if peer.stats is None:
        return peer.named
    paths = printable(here.database), printable(here.snapshot_dir)
    return paths == (peer.stats.database, peer.stats.snapshot_dir)


# ------------------------------------------------------------------------------ judging


def _judge_answers(
    here: Installation, answered: Sequence[Stats], known: Sequence[Stats], max_age: float | None
) -> tuple[Stats, Health]:
    judged = [(stats, judge(stats, max_age, here)) for stats in answered]
    stats, health = max(judged, key=lambda each: (each[1].healthy, each[0].started_at))
    found = list(health.findings)
    if health.state == "running":
        found = _within(lambda: _with_files(here, found), found)
    bridges = [each for each in known if each.database == stats.database]
    if len(bridges) > 1:
        alike = len({each.snapshot_dir for each in bridges}) == 1
        who = [f"{each.process}, {each.snapshot_dir}: {judge(each).verdict}" for each in bridges]
        found.append(several(here, who, "several_bridges" if alike else "two_snapshots"))
    return stats, Health(health.state, tuple(found))


def several(here: Installation, who: Sequence[str], code: str = "several_bridges") -> Finding:
    """Return the finding that so many processes write one database."""
    return here.finding(code, count=len(who), who="; ".join(who[:_MOST_NAMED]))


def _with_files(here: Installation, found: list[Finding]) -> list[Finding]:
    """Add what no sync has met yet, or never will; leave out what comes of it."""
    cut = cut_off(here)
    if any(each.code == "deleted_mount" for each in cut):
        return cut + [each for each in found if each.code not in _DELETED]
    found = found + cut
    if all(each.severity != "problem" for each in found):
        try:
            os.stat(here.database)
        except (FileNotFoundError, NotADirectoryError):
            found.append(here.finding("database_missing"))
    return found


def _judge_silent(here: Installation, peer: Peer) -> Health:
    if machine.is_paused(peer.pid):
        return Health("paused", (here.finding("paused", pid=peer.pid),))
    silence = duration(SILENT_SECONDS)
    who = f"{machine.described(peer.pid)} (user {peer.uid})"
    blocked = here.finding("blocked", pid=peer.pid, who=who, silence=silence)
    return Health("stuck", (blocked,))


def _judge_unasked(here: Installation, daemon: Daemon) -> Health:
    """Judge a daemon of which only /proc tells."""
    pid, fields, age = daemon.pid, machine.stat_of(daemon.pid), 0.0
    if machine.is_paused(pid):
        return Health("paused", (here.finding("paused", pid=pid),))
    with contextlib.suppress(IndexError):  # it has just ended
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    if age < _YOUNG_SECONDS:
        text = f"process {pid} was started {ago(age)}, and has no control socket yet"
        return Health("starting", (here.finding("starting", text),))
    return Health("running", (here.finding("unasked", pid=pid, uid=daemon.uid),))


def _judge_unanswered(
    here: Installation,
    peers: Sequence[Peer],
    same: Sequence[Peer],
    found: Sequence[Daemon],
    unasked: Sequence[Daemon],
    trusted: set[int],
) -> Health:
    """Judge where no daemon with these settings has answered, as `same` or `found` in /proc."""
    me = os.geteuid()
    if not os.path.isdir("/proc/self"):
        text = "/proc is not mounted: whether mbcap-watch runs cannot be told"
        return Health("unknown", (here.finding("no_proc", text),))
    if me:
        trusted = {me}  # root's socket may be there, and closed to this user
    if mine := [each for each in unasked if each.uid in trusted]:
        return _judge_unasked(here, mine[0])
    if unknown := tuple(_why_unknown(here, peers, unasked, trusted)):
        return Health("unknown", unknown)
    if not same and (hidden := [each for each in found if each.same is None]):
        pid, uid = hidden[0].pid, hidden[0].uid
        text = f"only user {uid} or root can tell which database process {pid} is for"
        return Health("unknown", (here.finding("not_asked", text, pid=pid, uid=uid, me=me),))
    return Health("not running", tuple(_absent(here, peers, same)))


def _why_unknown(
    here: Installation, peers: Sequence[Peer], unasked: Sequence[Daemon], trusted: set[int]
) -> Iterator[Finding]:
    """Name daemons with these settings whose answer is refused, not believed, not understood."""
    found = {each.pid: (each.uid, "", False) for each in unasked}
    for peer in peers:
        if _is_for(peer, here) and peer.fate != "gone":
            said = _verdict(peer.stats) if peer.stats else ""
            found[peer.pid] = (peer.uid, said, peer.fate == "odd")
    for pid, (uid, said, odd) in found.items():
        if uid not in trusted:
            code = "not_trusted" if said else "not_asked"
            yield here.finding(code, pid=pid, uid=uid, me=os.geteuid(), said=said)
        elif odd:
            yield here.finding("not_understood", pid=pid)


def _verdict(stats: Stats) -> str:
    health = judge(stats)
    why = "".join(f": {each.text}" for each in health.problems[:1])
    return printable(f"{health.verdict}{why}", 2 * QUOTED)


def _absent(here: Installation, peers: Sequence[Peer], same: Sequence[Peer]) -> Iterator[Finding]:
    gone = [here.finding("gone", pid=peer.pid) for peer in same if peer.fate == "gone"]
    yield from gone or [here.finding("not_running")]
    for peer in peers:
        if (stats := peer.stats) is not None and peer not in same:
            others = stats.database != printable(here.database)
            code = "other_settings" if others else "other_snapshot_dir"
            about = {"its_database": stats.database, "its_snapshot_dir": stats.snapshot_dir}
            yield here.finding(code, pid=peer.pid, uid=peer.uid, **about)


# ------------------------------------------------------------------------------ in /proc


class Daemon(NamedTuple):
    """A running bridge, its database, and whether that is the one asked for, if known."""

    pid: int
    uid: int
    database: str
    same: bool | None
    program: str = "mbcap-watch run"


def daemons(database: Path, peers: Sequence[Peer] = ()) -> list[Daemon]:
    """Return every `mbcap-watch run` that /proc shows, and of `peers` the embedded ones. Blocks."""
    file, found = place(Path(os.path.realpath(database))), list[Daemon]()
    for pid in machine.processes():
        with contextlib.suppress(OSError):  # it has just ended
            if machine.is_daemon(arguments := machine.arguments_of(pid)):
                uid = os.stat(f"/proc/{pid}").st_uid
                found.append(_daemon(pid, uid, arguments, file, database))
    for peer in peers:
        if (stats := peer.stats) is not None and stats.embedded_in is not None:
            same = _is_same(peer.pid, stats.database, file, database)
            found.append(Daemon(peer.pid, peer.uid, stats.database, same, stats.embedded_in))
    return found


def _daemon(pid: int, uid: int, arguments: list[str], file: Place, ours: Path) -> Daemon:
    named = machine.option(arguments, "--database")  # a command line is public
    try:
        variables = os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0")
        environ = dict(variable.partition("=")[::2] for variable in variables)
        here = os.readlink(f"/proc/{pid}/cwd")
        path = named or environ.get(f"{ENV_PREFIX}DATABASE") or environ.get(DATABASE_VARIABLE)
        config = machine.option(arguments, "--config") or environ.get(CONFIG_VARIABLE)
        toml = Path(f"/proc/{pid}/root" + os.path.join(here, config or CONFIG_FILE))
        if config or toml.exists():
            path = path or tomllib.loads(toml.read_text(encoding="utf-8")).get("database")
        path = os.path.normpath(os.path.join(here, path or DEFAULT_DATABASE))
    except (OSError, ValueError):
        same = None if named is None else named == str(ours)
        return Daemon(pid, uid, named or "a database that only root may know", same)
    return Daemon(pid, uid, path, _is_same(pid, path, file, ours))


def _is_same(pid: int, path: str, file: Place, ours: Path) -> bool:
    inside = place(Path(f"/proc/{pid}/root{path}")).status  # as it sees it, be it in a container
    if inside and file.status:
        return os.path.samestat(inside, file.status)
    return path == str(ours)
