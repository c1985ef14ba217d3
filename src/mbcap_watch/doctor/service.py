"""The running daemon: `look` asks it and judges; `examine` is its part of `check`."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from mbcap_watch.doctor import machine
from mbcap_watch.doctor.findings import Finding, Installation, ago, duration, ok
from mbcap_watch.doctor.health import Health, judge
from mbcap_watch.errors import QUOTED, printable
from mbcap_watch.telemetry.control import SILENT_SECONDS, ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mbcap_watch.settings import Settings
    from mbcap_watch.telemetry.control import Peer
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
    installation = Installation.of(settings)
    while True:
        peers = ask(settings, environ, everyone=everyone)
        trusted = _trusted(settings, peers)
        same = [peer for peer in peers if _is_for(peer, settings) and peer.uid in trusted]
        if answered := [peer for peer in same if peer.stats is not None]:
            return _judge_answer(answered, peers, trusted, settings, max_age)
        if silent := [peer for peer in same if peer.fate == "silent"]:
            return None, _judge_silent(installation, silent[0])
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
        return None, _judge_unasked(installation, mine[0])
    if hidden:
        return None, Health.of("unknown", hidden)
    return None, Health.of("not running", _absent(peers, same, settings))


def _trusted(settings: Settings, peers: Sequence[Peer]) -> set[int]:
    """Return the users whose sockets are believed.

    Anybody can offer a socket. Root also believes the owner of the database, because the daemon is
    meant to run as that user.
    """
    uids = {0, os.geteuid()}
    if os.geteuid() == 0 and any(peer.uid for peer in peers):
        owner = _within(lambda: os.stat(settings.database).st_uid, None)
        uids |= set() if owner is None else {owner}
    return uids


def _within(function: Callable[[], T], otherwise: T) -> T:
    """Call a function that touches files; return `otherwise` if it fails or takes long."""
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
    health, installation = judge(stats, max_age), Installation.of(settings)
    problems = tuple(_twins(installation, stats, [each for each in peers if each.uid in trusted]))
    if health.healthy and _within(lambda: _is_missing(settings.database), otherwise=False):
        problems += (installation.finding("database_missing"),)
    return stats, msgspec.structs.replace(health, problems=problems + health.problems)


def _is_missing(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False


def _twins(installation: Installation, stats: Stats, peers: Sequence[Peer]) -> Iterator[Finding]:
    names = [
        f"{each.pid} (user {each.uid}, {each.stats.snapshot_dir})"
        for each in peers
        if each.stats and each.pid != stats.pid and each.stats.database == stats.database
    ]
    if names:
        who = f"process {stats.pid} and {', '.join(names)}"
        yield installation.finding("two_daemons", who=who)


def _judge_silent(installation: Installation, peer: Peer) -> Health:
    if machine.is_paused(peer.pid):
        return Health.of("paused", [installation.finding("paused", pid=peer.pid)])
    silence = duration(SILENT_SECONDS)
    blocked = installation.finding("blocked", pid=peer.pid, uid=peer.uid, silence=silence)
    return Health.of("stuck", [blocked])


def _judge_unasked(installation: Installation, daemon: machine.Daemon) -> Health:
    """Judge a daemon of which only /proc tells."""
    pid, age = daemon.pid, _age(daemon.pid)
    if daemon.paused:
        return Health.of("paused", [installation.finding("paused", pid=pid)])
    if age < _YOUNG_SECONDS:
        text = f"process {pid} was started {ago(age)}, and has no control socket yet"
        return Health.of("starting", [installation.finding("starting", text)])
    return Health.of("running", [installation.finding("unasked", pid=pid, uid=daemon.uid)])


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
    installation, me = Installation.of(settings), os.geteuid()
    others = {each.pid: (each.uid, "") for each in unasked}
    for peer in peers:
        if _is_for(peer, settings) and peer.fate != "gone":
            others[peer.pid] = (peer.uid, _quote(peer.stats) if peer.stats else "")
    for pid, (uid, said) in others.items():
        if uid not in trusted:
            code = "not_trusted" if said else "not_asked"
            yield installation.finding(code, pid=pid, uid=uid, me=me, said=said)
        elif any(peer.pid == pid and peer.fate == "odd" for peer in peers):
            yield installation.finding("not_understood", pid=pid)


def _quote(stats: Stats) -> str:
    health = judge(stats)
    why = "".join(f": {each.text}" for each in health.problems[:1])
    return printable(f"{health.verdict}{why}", 2 * QUOTED)


def _absent(peers: Sequence[Peer], same: Sequence[Peer], settings: Settings) -> Iterator[Finding]:
    installation = Installation.of(settings)
    gone = [installation.finding("gone", pid=peer.pid) for peer in same if peer.fate == "gone"]
    yield from gone or [installation.finding("not_running")]
    for peer in peers:
        if peer.stats is not None and peer not in same:
            others = peer.stats.database != printable(str(settings.database))
            yield installation.finding(
                "other_settings" if others else "other_snapshot_dir",
                pid=peer.pid,
                uid=peer.uid,
                its_database=peer.stats.database,
                its_snapshot_dir=peer.stats.snapshot_dir,
            )


# ------------------------------------------------------------------------------ for `check`

# What an examination of the files cannot see.
_UNSEEN: Final = {
    "blocked",
    "gone",
    "limit",
    "no_apply",
    "no_sync",
    "not_permitted",
    "not_trusted",
    "rows_refused",
}

# What is not wrong with an installation.
_HARMLESS: Final = {"not_asked", "not_running", "starting"}


def examine(settings: Settings, environ: Mapping[str, str], *, explained: bool) -> list[Finding]:
    """Ask the daemon with these settings how it is. Blocks.

    Args:
        settings: of the daemon.
        environ: the environment, for `RUNTIME_DIRECTORY`.
        explained: whether a problem was found that may be why it is not well.

    """
    _, health = look(settings, environ)
    found = [ok("service", health.verdict)] if health.healthy else []
    for each in health.problems:
        text = f"{health.state}: {each.text}"
        if each.code in _HARMLESS:
            found.append(ok("service", text))
        # As another user, or a moment later, all may look well from here.
        elif each.code in _UNSEEN or not explained:
            found.append(msgspec.structs.replace(each, subject="service", text=text))
    return found + [each for each in health.warnings if each.code == "other_snapshot_dir"]
