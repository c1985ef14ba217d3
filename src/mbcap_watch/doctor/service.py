"""The running bridges: `survey` finds them by their sockets and in /proc, `look` judges one."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from mbcap_watch.doctor import machine
from mbcap_watch.doctor.findings import Finding, Installation, ago, duration
from mbcap_watch.doctor.health import Health, judge
from mbcap_watch.errors import QUOTED, printable
from mbcap_watch.telemetry.ask import SILENT_SECONDS, ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mbcap_watch.settings import Settings
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


class Bridge(NamedTuple):
    """A bridge, as its socket and /proc tell of it.

    Attributes:
        pid: of the process; `uid` whose it is.
        believed: whether what that user's socket says is believed.
        program: its program, as /proc or a socket that is believed names it; else empty.
        database: its database: our path if that leads to the same; None: only root can tell.
        snapshot_dir: likewise; None if that cannot be told.
        fate: as of `Peer`; `unseen` if it has no socket that can be reached from here.
        stats: what it answered.

    """

    pid: int
    uid: int
    believed: bool
    program: str
    database: str | None
    snapshot_dir: str | None = None
    fate: str = "unseen"
    stats: Stats | None = None

    def is_for(self, here: Installation) -> bool:
        """Whether it runs with these settings, as far as that can be told."""
        is_same = self.snapshot_dir in (None, printable(here.snapshot_dir))
        return is_same and self.has_database(here)

    def has_database(self, here: Installation) -> bool:
        """Whether it is for this database."""
        return self.database == printable(here.database)


def survey(here: Installation, settings: Settings, environ: Mapping[str, str]) -> list[Bridge]:
    """Return every bridge that a socket or /proc tells of. Takes a few seconds at most."""
    peers = ask(settings, environ)
    trusted = {0, os.geteuid()}
    if os.geteuid() == 0:
        trusted.add(_within(lambda: os.stat(here.database).st_uid, 0))
    daemons: dict[int, tuple[int, str | None]] = _within(machine.daemons, {})
    bridges = []
    for peer in peers:
        believed, stats = peer.uid in trusted, peer.stats
        program = machine.DAEMON if peer.pid in daemons else ""
        if stats is not None:
            program = (believed and stats.embedded_in) or program
            paths = stats.database, stats.snapshot_dir
        elif peer.named and not (program and peer.fate == "gone"):  # such a daemon is just ending
            paths = printable(here.database), printable(here.snapshot_dir)
        else:
            continue  # /proc may tell more
        bridges.append(Bridge(peer.pid, peer.uid, believed, program, *paths, peer.fate, stats))
    for pid in daemons.keys() - {each.pid for each in bridges}:
        uid, database = daemons[pid]
        bridges.append(Bridge(pid, uid, uid in trusted, machine.DAEMON, database))
    return _within(lambda: [_with_our_paths(each, here) for each in bridges], bridges)


def _with_our_paths(bridge: Bridge, here: Installation) -> Bridge:
    """Return a bridge with our paths in place of its own that lead to the same files."""

    def seen(its: str | None, ours: str) -> str | None:
        leads_there = its is not None and machine.leads_to(bridge.pid, its, ours)
        return printable(ours) if leads_there else its

    bridge = bridge._replace(database=seen(bridge.database, here.database))
    if not bridge.has_database(here):
        return bridge
    return bridge._replace(snapshot_dir=seen(bridge.snapshot_dir, here.snapshot_dir))


def hides_others() -> bool:
    """Whether /proc shows this user no processes of others (`hidepid`, proc(5))."""
    return not os.access("/proc/1/cmdline", os.R_OK)


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


def look(
    settings: Settings,
    environ: Mapping[str, str],
    max_age: float | None = None,
    config: str | Path | None = None,
    *,
    anyone: bool = False,
) -> tuple[Stats | None, Health]:
    """Ask the bridge with these settings for its stats, and judge. Takes a few seconds at most.

    Of several, a healthy one is preferred, and all are named. `config` is the file that the
    settings are from, for the commands in remedies. `anyone`: if none has these settings, ask the
    only one that there is.
    """
    here, tries = Installation.of(settings, config), _TRIES
    while True:
        bridges = survey(here, settings, environ)
        ours = [each for each in bridges if each.is_for(here)]
        several = _several(here, bridges)
        if answered := [each.stats for each in ours if each.believed and each.stats]:
            stats, findings = _judge_answers(here, answered, max_age)
            return stats, Health((*findings, *several))
        if silent := [each for each in ours if each.believed and each.fate == "silent"]:
            return None, Health((_unheard(here, silent[0]), *several))
        is_unsure = any(each.fate in ("unseen", "odd") for each in ours)
        stats_of_all = [each.stats for each in bridges if each.believed and each.stats]
        others = {(stats.database, stats.snapshot_dir) for stats in stats_of_all}
        if anyone and len(others) == 1 and not is_unsure:
            [(database, snapshot_dir)] = others
            here = here._replace(database=database, snapshot_dir=snapshot_dir)
            continue
        tries -= 1
        if not is_unsure or not tries:
            return None, Health((*_unanswered(here, bridges, ours), *several))
        time.sleep(_AGAIN_SECONDS)


def _judge_answers(
    here: Installation, answered: Sequence[Stats], max_age: float | None
) -> tuple[Stats, list[Finding]]:
    judged = [(stats, judge(stats, max_age, here)) for stats in answered]
    stats, health = max(judged, key=lambda each: (each[1].healthy, each[0].started_at))
    found = list(health.findings)
    if health.state == "running":
        found = _within(lambda: _with_files(here, found), found)
    return stats, found


def _with_files(here: Installation, found: list[Finding]) -> list[Finding]:
    """Add what a look at the files shows and no sync has met; leave out what follows from it."""
    cut = machine.cut_off(here)
    if any(each.code == "deleted_mount" for each in cut):
        return cut + [each for each in found if each.code not in _DELETED]
    found = found + cut
    if all(each.severity != "problem" for each in found):
        try:
            os.stat(here.database)
        except (FileNotFoundError, NotADirectoryError):
            found.append(here.finding("database_missing"))
    return found


def _several(here: Installation, bridges: Sequence[Bridge]) -> list[Finding]:
    """Name the bridges with this database if they are several; also those that do not answer."""
    who, snapshots = list[str](), set[str]()
    for each in bridges:
        if not each.has_database(here) or each.fate == "gone":
            continue
        if each.believed and each.stats:
            where, verdict = each.stats.snapshot_dir, judge(each.stats).verdict
            who.append(f"pid {each.stats.process}, {where}: {verdict}")
            snapshots.add(str(each.snapshot_dir))
        elif each.believed or each.program:
            state = Health((_unheard(here, each),)).state
            who.append(f"pid {each.pid} (user {each.uid}): {state}")
    if len(who) <= 1:
        return []
    code = "several_bridges" if len(snapshots) <= 1 else "two_snapshots"
    return [here.finding(code, count=len(who), who="; ".join(who[:_MOST_NAMED]))]


def _unheard(here: Installation, bridge: Bridge) -> Finding:
    """Judge a bridge that has not answered, by its process."""
    pid, uid = bridge.pid, bridge.uid
    if machine.is_paused(pid):
        return here.finding("paused", pid=pid)
    if bridge.fate == "silent":
        who = f"{machine.described(pid)} (user {uid})"
        return here.finding("blocked", who=who, silence=duration(SILENT_SECONDS))
    if (age := machine.age_of(pid)) < _YOUNG_SECONDS:
        text = f"process {pid} was started {ago(age)}, and has no control socket yet"
        return here.finding("starting", text)
    return here.finding("unasked", pid=pid, uid=uid)


def _unanswered(
    here: Installation, bridges: Sequence[Bridge], ours: Sequence[Bridge]
) -> list[Finding]:
    """Judge where no bridge with these settings has answered; `ours` have them."""
    if not os.path.isdir("/proc/self"):
        text = "/proc is not mounted: whether mbcap-watch runs cannot be told"
        return [here.finding("no_proc", text)]
    unknown = list[Finding]()
    for each in ours:
        me, pid, uid = os.geteuid(), each.pid, each.uid
        # To others than root, root's socket may be closed.
        if not (each.believed if me == 0 else uid == me):
            code, said = ("not_trusted", _verdict(each.stats)) if each.stats else ("not_asked", "")
            if each.fate != "gone":
                unknown.append(here.finding(code, pid=pid, uid=uid, me=me, said=said))
        elif each.fate == "unseen":
            return [_unheard(here, each)]
        elif each.fate == "odd":
            unknown.append(here.finding("not_understood", pid=pid))
    hidden = [each for each in bridges if each.database is None]
    if hidden and not unknown and not any(each.believed for each in ours):
        pid, uid, me = hidden[0].pid, hidden[0].uid, os.geteuid()
        text = f"only user {uid} or root can tell which database process {pid} is for"
        return [here.finding("not_asked", text, pid=pid, uid=uid, me=me)]
    return unknown or list(_absent(here, bridges, ours))


def _verdict(stats: Stats) -> str:
    health = judge(stats)
    why = "".join(f": {each.text}" for each in health.problems[:1])
    return printable(f"{health.verdict}{why}", 2 * QUOTED)


def _absent(
    here: Installation, bridges: Sequence[Bridge], ours: Sequence[Bridge]
) -> Iterator[Finding]:
    gone = [each.pid for each in ours if each.believed and each.fate == "gone"]
    code = "hidden" if hides_others() else "not_running"
    none = here.finding(code, me=os.geteuid())
    yield from [here.finding("gone", pid=pid) for pid in gone] or [none]
    for each in bridges:
        if (stats := each.stats) is not None and each not in ours:
            code = "other_snapshot_dir" if each.has_database(here) else "other_settings"
            about = {"its_database": stats.database, "its_snapshot_dir": stats.snapshot_dir}
            yield here.finding(code, pid=each.pid, uid=each.uid, **about)
