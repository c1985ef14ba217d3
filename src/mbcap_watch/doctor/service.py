"""The running daemon: `look` asks it and judges; `examine` is its part of `check`."""

from __future__ import annotations

import contextlib
import os
import shlex
import threading
import time
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from mbcap_watch.doctor import findings as check
from mbcap_watch.doctor import machine
from mbcap_watch.doctor.findings import duration
from mbcap_watch.doctor.health import Finding, Health, finding, judge
from mbcap_watch.doctor.remedies import remedy
from mbcap_watch.errors import QUOTED, printable
from mbcap_watch.telemetry.ask import SILENT_SECONDS, ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mbcap_watch.settings import Settings
    from mbcap_watch.telemetry.ask import Peer
    from mbcap_watch.telemetry.stats import Stats

T = TypeVar("T")

# A daemon makes its socket within a second of its start, and removes it less than a second before
# its end. So one without a socket is looked at again, and is starting while it is young.
_AGAIN_SECONDS: Final = 0.25
_TRIES: Final = 4
_YOUNG_SECONDS: Final = 10.0

# For how long files are asked for what they are; a mount whose server is gone never answers.
_FILE_SECONDS: Final = 1.0


def look(
    settings: Settings, environ: Mapping[str, str], max_age: float | None = None
) -> tuple[Stats | None, Health]:
    """Ask the daemon with these settings for its stats, and judge. Takes a few seconds at most.

    Args:
        settings: of the daemon.
        environ: the environment, for `RUNTIME_DIRECTORY`.
        max_age: see `judge`.

    """
    tries, everyone, nobody = _TRIES, False, list[machine.Daemon]()
    while True:
        peers = ask(settings, environ, everyone=everyone)
        trusted = _trusted(settings, peers)
        same = [peer for peer in peers if _is_for(peer, settings) and peer.uid in trusted]
        if answered := [peer for peer in same if peer.stats is not None]:
            return _judge_answer(answered, peers, trusted, settings, max_age)
        if silent := [peer for peer in same if peer.fate == "silent"]:
            return None, _judge_silent(silent[0])
        if not everyone:
            everyone = True
            continue
        known = {peer.pid for peer in peers if peer.stats is not None}
        unasked = [
            each
            for each in _within(lambda: machine.daemons(settings.database), nobody)
            if each.same and each.pid not in known
        ]
        tries -= 1
        if not unasked or not tries:
            break
        time.sleep(_AGAIN_SECONDS)
    if os.geteuid():
        trusted = {os.geteuid()}  # root's socket may be there, and closed to this user
    hidden = tuple(_hidden(peers, unasked, trusted, settings))
    if mine := [each for each in unasked if each.uid in trusted]:
        return None, _judge_unasked(mine[0])
    if hidden:
        return None, Health("unknown", hidden)
    return None, Health("not running", tuple(_absent(peers, same, settings)))


def _trusted(settings: Settings, peers: Sequence[Peer]) -> set[int]:
    """Return whose daemons are taken for the one that is asked for.

    Anybody can offer a socket. Root believes the owner of the database, too: that is as whom the
    daemon is to run.
    """
    uids = {0, os.geteuid()}
    if os.geteuid() == 0 and any(peer.uid for peer in peers):
        owner = _within(lambda: os.stat(settings.database).st_uid, None)
        uids |= set() if owner is None else {owner}
    return uids


def _within(function: Callable[[], T], otherwise: T) -> T:
    """Return what a function returns that asks files; `otherwise` if it fails or takes long."""
    answer = [otherwise]

    def run() -> None:
        try:
            answer[0] = function()
        except OSError:
            return

    thread = threading.Thread(target=run, daemon=True)
    with contextlib.suppress(RuntimeError):  # there is no thread for it
        thread.start()
        thread.join(_FILE_SECONDS)
    return answer[0]


def _is_for(peer: Peer, settings: Settings) -> bool:
    """Whether a socket is of a daemon with these settings: by its own word, else by its name."""
    if peer.stats is None:
        return peer.named
    paths = printable(str(settings.database)), printable(str(settings.snapshot_dir))
    return paths == (peer.stats.database, peer.stats.snapshot_dir)


# ------------------------------------------------------------------------------ judging


def _judge_answer(
    answered: list[Peer],
    peers: Sequence[Peer],
    trusted: set[int],
    settings: Settings,
    max_age: float | None,
) -> tuple[Stats, Health]:
    stats = max((each.stats for each in answered if each.stats), key=lambda each: each.started_at)
    health = judge(stats, max_age)
    problems = tuple(_twins(stats, [peer for peer in peers if peer.uid in trusted]))
    if health.healthy and _within(lambda: _is_missing(settings.database), otherwise=False):
        text = f"{settings.database}: there is no such file any more"
        problems += (finding("database_missing", text, stats),)
    return stats, msgspec.structs.replace(health, problems=problems + health.problems)


def _is_missing(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False


def _twins(stats: Stats, peers: Sequence[Peer]) -> Iterator[Finding]:
    names = [
        f"{each.pid} (uid {each.uid}, {each.stats.snapshot_dir})"
        for each in peers
        if each.stats and each.pid != stats.pid and each.stats.database == stats.database
    ]
    if names:
        text = f"more than one mbcap-watch writes this database: process {stats.pid} and"
        yield finding("two_daemons", f"{text} {', '.join(names)}")


def _judge_silent(peer: Peer) -> Health:
    text = f"process {peer.pid} (uid {peer.uid})"
    if machine.is_paused(peer.pid):
        return Health("paused", (finding("paused", f"{text} is paused", pid=peer.pid),))
    text += f" has not answered for {SILENT_SECONDS:g} s: it hangs, or gets no processor"
    return Health("stuck", (finding("blocked", text, pid=peer.pid),))


def _judge_unasked(daemon: machine.Daemon) -> Health:
    """Judge a daemon of which only /proc tells."""
    text = f"process {daemon.pid} (uid {daemon.uid})"
    if daemon.paused:
        return Health("paused", (finding("paused", f"{text} is paused", pid=daemon.pid),))
    if (age := _age(daemon.pid)) < _YOUNG_SECONDS:
        started = f"{text} was started {duration(age)} ago, and has no control socket yet"
        return Health("starting", (finding("starting", started),))
    text += " has no control socket that can be reached from here"
    return Health("running", (), (finding("unasked", text),))


def _age(pid: int) -> float:
    """Return for how many seconds a process has been running."""
    fields = machine.stat_of(pid)
    if len(fields) < 20:  # noqa: PLR2004 - it has just ended
        return 0.0
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _hidden(
    peers: Sequence[Peer],
    unasked: Sequence[machine.Daemon],
    trusted: set[int],
    settings: Settings,
) -> Iterator[Finding]:
    """Tell of daemons with these settings that are another user's, and not believed."""
    command = f"mbcap-watch status --database {shlex.quote(str(settings.database))}"
    command += f" --snapshot-dir {shlex.quote(str(settings.snapshot_dir))}"
    me = os.geteuid()
    others: dict[int, tuple[int, str]] = {each.pid: (each.uid, "") for each in unasked}
    for peer in peers:
        if _is_for(peer, settings) and peer.fate != "gone":
            others[peer.pid] = (peer.uid, _quote(peer.stats) if peer.stats else "")
    for pid, (uid, said) in others.items():
        if uid not in trusted:
            why = "does not rely on that" if said else "may not ask it"
            text = f"process {pid} is of uid {uid}{said}; uid {me} {why}"
            root = "" if me == 0 else "as root (sudo), or "
            how = f"ask {root}as that user: sudo -u '#{uid}' {command}"
            yield Finding("not_permitted", text, how)
        elif any(peer.pid == pid and peer.fate == "odd" for peer in peers):
            yield finding("not_understood", f"the answer of process {pid} is not understood")


def _quote(stats: Stats) -> str:
    health = judge(stats)
    why = "".join(f": {each.text}" for each in health.problems[:1])
    return printable(f", and says: {health.verdict}{why}", 2 * QUOTED)


def _absent(peers: Sequence[Peer], same: Sequence[Peer], settings: Settings) -> Iterator[Finding]:
    gone = [peer for peer in same if peer.fate == "gone"]
    for peer in gone:
        yield finding("gone", f"process {peer.pid} is gone; it was killed, or crashed")
    if not gone:
        text = f"no mbcap-watch runs with --database {settings.database}"
        yield finding("not_running", f"{text} --snapshot-dir {settings.snapshot_dir}")
    for peer in peers:
        if peer.stats is None or peer in same:
            continue
        text, how = f"process {peer.pid} (uid {peer.uid})", remedy("other_settings")
        if peer.stats.database == printable(str(settings.database)):
            text += " serves this database, but from another snapshot directory:"
            yield Finding("other_snapshot_dir", f"{text} {peer.stats.snapshot_dir}", how)
        else:
            text += f" runs with --database {peer.stats.database}"
            yield Finding("other_settings", f"{text} --snapshot-dir {peer.stats.snapshot_dir}", how)


# ------------------------------------------------------------------------------ for `check`

# What an examination of the files cannot see.
_UNSEEN: Final = {
    *("blocked", "gone", "limit", "no_apply", "no_sync", "not_permitted", "rows_refused"),
}

# What it names in lines of their own.
_SEEN: Final = {"other_settings", "paused", "two_daemons"}


def examine(
    settings: Settings, environ: Mapping[str, str], *, explained: bool
) -> list[check.Finding]:
    """Ask the daemon with these settings how it is. Blocks.

    Args:
        settings: of the daemon.
        environ: the environment, for `RUNTIME_DIRECTORY`.
        explained: whether a problem was found that may be why it is not well.

    """
    _, health = look(settings, environ)
    found = [check.ok("service", health.verdict)] if health.healthy else []
    for each in health.problems:
        if each.code == "not_running":
            found.append(check.ok("service", "no mbcap-watch runs with these settings"))
        elif each.code == "other_snapshot_dir":
            found.append(check.warning("service", each.text, each.remedy))
        # As another user, or a moment later, all may look well from here.
        elif each.code in _UNSEEN or not (explained or each.code in _SEEN):
            found.append(check.problem("service", f"{health.state}: {each.text}", each.remedy))
    return found
