"""`check`: what is wrong with an installation, and what to do about it.

Nothing is changed. Nothing is raised. A filesystem that does not answer is given up after some
seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import msgspec

from mbcap_watch.bridge.thread import in_daemon_thread
from mbcap_watch.doctor import database, machine, service, snapshot
from mbcap_watch.doctor.findings import Finding, Installation, duration, ok, quote
from mbcap_watch.doctor.health import CLOCK_SECONDS
from mbcap_watch.errors import QUOTED, printable
from mbcap_watch.limits import require_descriptors
from mbcap_watch.store.errors import SIDES
from mbcap_watch.watcher.mounts import UNKNOWN, mount_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from mbcap_watch.settings import Settings
    from mbcap_watch.store.plan import Value

# How long examining files, or what is in them, may take before it counts as hung.
FILE_SECONDS: Final = 5.0
DATA_SECONDS: Final = 15.0

# What the examinations need at once: a database with its -wal and -shm, a watch, directories.
_DESCRIPTORS: Final = 24

# After so long without a write, a database may be an old copy.
_SILENT_SECONDS: Final = 3600.0

# What an examination of the files cannot see.
_UNSEEN: Final = {
    *("blocked", "gone", "limit", "no_apply", "no_sync", "not_permitted", "not_trusted", "paused"),
    *("rows_refused", "two_snapshots"),
}

# What only a daemon knows, or only shows where one runs.
_TOLD_BY_DAEMON: Final = {
    *("ack_failed", "http_down", "log_unread", "other_snapshot_dir", "set_back", "several_bridges"),
}

# What is not wrong with an installation.
_HARMLESS: Final = {"not_asked", "not_running", "starting"}


async def examine(
    settings: Settings, environ: Mapping[str, str], config: Path | None = None
) -> list[Finding]:
    """Examine an installation: the database, the snapshot, the watch, and who else is there."""
    here = Installation.of(settings, config)
    try:
        require_descriptors(_DESCRIPTORS)
    except OSError as exc:  # everything would fail, for no reason of its own
        return [here.finding("limit", f"check cannot work: {exc.strerror}")]
    ask = partial(_ask, here)
    values: dict[str, Value] = {}
    outside, inside = await asyncio.gather(
        ask(FILE_SECONDS, here.database, database.examine, environ),
        ask(DATA_SECONDS, here.snapshot_dir, snapshot.examine, settings, values),
    )
    findings = outside + inside
    if not _hangs(inside):  # what does not answer is not asked again
        findings += await ask(FILE_SECONDS, here.snapshot_dir, snapshot.examine_watch, settings)
    if not _hangs(outside):
        for found in await asyncio.gather(
            ask(DATA_SECONDS, here.database, database.examine_contents, settings, values),
            ask(FILE_SECONDS, here.database, _examine_holders),
            ask(DATA_SECONDS, here.database, _examine_daemons, settings, environ),
        ):
            findings += found
    explained = exit_code(findings) == 1
    # The control sockets are in /run, or near it.
    findings += await ask(DATA_SECONDS, "/run", _examine_service, settings, environ, explained)
    return list(_once(findings))


def _hangs(findings: Iterable[Finding]) -> bool:
    return any(each.code in ("no_answer", "check_failed") for each in findings)


def _once(findings: list[Finding]) -> Iterable[Finding]:
    """Leave out what was found before: SQLite repeats what its files have shown."""
    codes: set[str] = set()
    if any(each.code == "snapshot_vanished" for each in findings):  # the daemon knows more
        findings = [each for each in findings if each.code != "no_snapshot"]
    for each in findings:
        if each.severity != "problem" or each.code not in codes:
            yield each
        codes.add(each.code)


async def _ask(
    here: Installation,
    seconds: float,
    path: str,
    examination: Callable[..., Iterable[Finding]],
    *arguments: Any,
) -> list[Finding]:
    """Wait for an examination of what is at `path`; its failure is a finding."""
    try:
        with anyio.fail_after(seconds):
            return await in_daemon_thread(lambda: list(examination(here, *arguments)))
    except TimeoutError:
        # Only the names of mounts: everything else would hang, too.
        above = [mount for mount in mount_table() if Path(path).is_relative_to(mount.mount_point)]
        mount = max(above, key=lambda each: len(Path(each.mount_point).parts), default=UNKNOWN)
        where, point = f"{mount.type}, mounted on {mount.mount_point}", quote(mount.mount_point)
        about = {"where": where, "seconds": duration(seconds), "point": point}
        answer = here.finding("no_answer", path=path, **about)
    except Exception as exc:  # noqa: BLE001 - the other examinations go on
        error = f"{type(exc).__name__}: {printable(str(exc), QUOTED)}"
        answer = here.finding("check_failed", path=path, error=error)
    return [answer]


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 1 if there is a problem, else 0."""
    return int(any(finding.severity == "problem" for finding in findings))


def _examine_holders(here: Installation) -> Iterator[Finding]:
    """Examine who has the database open, and whether anybody writes it. Blocks."""
    file = machine.place(Path(os.path.realpath(here.database)))
    sides = [machine.place(Path(f"{file.path}{side}")) for side in SIDES]
    written = [each.status.st_mtime for each in (file, *sides) if each.status]
    silence = time.time() - max(written, default=time.time())
    if silence > _SILENT_SECONDS:
        yield here.finding("no_activity", silence=duration(silence))
    elif silence < -CLOCK_SECONDS:
        yield here.finding("clock", later=duration(-silence))
    if not os.path.isdir("/proc/self"):
        yield here.finding("no_proc")
        return
    holders, strays = set[str](), set[str]()
    for pid, descriptor, link in _open_files():
        name = link.removesuffix(" (deleted)")
        if name != link and name in (str(file.path), f"{file.path}-wal"):
            strays.add(machine.described(pid))
        # By name first: to ask for the status of just any file could block. In a container the
        # directory may have another name.
        elif os.path.basename(name) == file.path.name and file.status:
            its = machine.place(Path(descriptor)).status
            if its and os.path.samestat(its, file.status):
                holders.add(machine.described(pid))
    if strays:
        yield here.finding("database_replaced", who=", ".join(sorted(strays)))
    nobody = "nobody that this user may see; other containers cannot be seen"
    yield ok("open by", ", ".join(sorted(holders)) or nobody)


def _open_files() -> Iterator[tuple[int, str, str]]:
    """Yield what other processes have open: the pid, the descriptor in /proc, the file's name."""
    for pid in machine.running():
        with contextlib.suppress(OSError):  # it has just ended, or is somebody else's
            for number in os.listdir(f"/proc/{pid}/fd"):
                descriptor = f"/proc/{pid}/fd/{number}"
                with contextlib.suppress(FileNotFoundError):  # it was closed just now
                    yield pid, descriptor, os.readlink(descriptor)


def _examine_service(
    here: Installation, settings: Settings, environ: Mapping[str, str], explained: object
) -> Iterator[Finding]:
    """Ask the daemon with these settings how it is, for `check`. Blocks.

    `explained`: a problem was found that may be why it is not well.
    """
    stats, health = service.look(settings, environ, config=here.config)
    if health.healthy:
        yield ok("service", health.verdict + (f": process {stats.process}" if stats else ""))
    for each in health.problems:
        text = f"{health.state}: {each.text}"
        if each.code in _HARMLESS:
            yield ok("service", text)
        # As another user, or a moment later, all may look well from here.
        elif each.code in _UNSEEN or not explained:
            yield msgspec.structs.replace(each, subject="service", text=text)
    for each in health.warnings:
        if each.code in _TOLD_BY_DAEMON:
            yield each


def _examine_daemons(
    here: Installation, settings: Settings, environ: Mapping[str, str]
) -> list[Finding]:
    """Name the bridges that run; judge as whom the one of the database does. Blocks."""
    if not os.path.isdir("/proc/self"):
        return []  # `_examine_holders` has reported it
    found = [each for each in service.survey(here, settings, environ) if each.program]
    ours = [each for each in found if each.has_database(here)]
    named = (f"pid {each.pid} (user {each.uid}, {each.database}, {each.program})" for each in ours)
    seen = "none that this user may see" if service.hides_others() else "none"
    who = ", ".join(named) or f"{seen} runs for this database"
    if len(ours) == 1:  # `look` names several
        if machine.is_paused(ours[0].pid):
            return [here.finding("paused", pid=ours[0].pid)]
        if ours[0].uid != os.geteuid():
            return [here.finding("other_user", who=who, uid=ours[0].uid)]
    hidden = "a database that only root may know"
    others = [f"pid {each.pid} for {each.database or hidden}" for each in found if each not in ours]
    return [ok("daemons", ", ".join([who, *others]))]
