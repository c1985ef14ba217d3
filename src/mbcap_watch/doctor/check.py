"""`check`: what is wrong with an installation, and what to do about it.

Nothing is changed, nothing is raised, and what does not answer is left behind after some seconds.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import anyio

from mbcap_watch.bridge.thread import in_daemon_thread
from mbcap_watch.doctor import contents, database, machine, service, snapshot
from mbcap_watch.doctor.findings import Finding, Installation, duration, quote
from mbcap_watch.errors import QUOTED, printable
from mbcap_watch.limits import require_descriptors
from mbcap_watch.watcher.mounts import mount_table
from mbcap_watch.watcher.supervisor import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from mbcap_watch.settings import Settings
    from mbcap_watch.store.plan import Value

T = TypeVar("T")

# How long examining files, or what is in them, may take before it counts as hung.
FILE_SECONDS: Final = 5.0
DATA_SECONDS: Final = 15.0

# What the examinations need at once: a database with its -wal and -shm, a watch, directories.
_DESCRIPTORS: Final = 24

# Where the stats files are, for the line about a filesystem that does not answer.
RUNTIME: Final = Path("/dev/shm")  # noqa: S108 - only a name


async def examine(
    settings: Settings, environ: Mapping[str, str], config: Path | None = None
) -> list[Finding]:
    """Examine an installation: the database, the snapshot, the watch, and who else is there.

    Args:
        settings: as `run` would have them.
        environ: the environment, for hints at a wrong path.
        config: the file that the settings are from, for the commands in remedies.

    """
    installation = Installation.of(settings, config)
    try:
        require_descriptors(_DESCRIPTORS)
    except OSError as exc:  # everything would fail, for no reason of its own
        return [installation.finding("limit", f"check cannot work: {exc.strerror}")]
    findings = list(_without_proc(installation))
    ask = partial(_ask, installation)
    outside, inside = await asyncio.gather(
        ask(FILE_SECONDS, settings.database, partial(database.examine, installation, environ)),
        ask(DATA_SECONDS, settings.snapshot_dir, partial(snapshot.examine, installation, settings)),
    )
    parts = [outside]
    values: dict[str, Value] = {}
    if isinstance(inside, Finding):  # what does not answer is not asked again
        parts.append(inside)
    else:
        found, values = inside
        watch = partial(_watch, installation, settings)
        parts += [found, await ask(FILE_SECONDS, settings.snapshot_dir, watch)]
    if not isinstance(outside, Finding):
        read = partial(contents.examine, installation, settings, values)
        parts += await asyncio.gather(
            ask(DATA_SECONDS, settings.database, read),
            ask(FILE_SECONDS, settings.database, partial(machine.examine, installation)),
        )
    findings += _flat(parts)
    explained = exit_code(findings) == 1
    last = partial(service.examine, settings, environ, explained=explained)
    findings += _flat([await ask(FILE_SECONDS, RUNTIME, last)])
    return list(_once(findings))


def _flat(parts: Iterable[list[Finding] | Finding]) -> list[Finding]:
    return [each for part in parts for each in ([part] if isinstance(part, Finding) else part)]


def _once(findings: Iterable[Finding]) -> Iterable[Finding]:
    """Leave out what SQLite says again of a problem that its files have shown before."""
    codes: set[str] = set()
    for each in findings:
        if each.severity != "problem" or each.code not in codes:
            yield each
        codes.add(each.code)


def _without_proc(installation: Installation) -> Iterable[Finding]:
    if not os.path.isdir("/proc/self/fd"):
        yield installation.finding("no_proc")


def _watch(installation: Installation, settings: Settings) -> list[Finding]:
    """Do what `run` does at its start, and undo it."""
    watch = Watch(settings, lambda: None)
    try:
        watch.refresh()
        return snapshot.examine_watch(installation, settings, watch.state)
    finally:
        watch.close()


async def _ask(
    installation: Installation, seconds: float, path: Path, examination: Callable[[], T]
) -> T | Finding:
    """Wait for an examination of what is at `path`; what goes wrong with it is a finding."""
    try:
        with anyio.fail_after(seconds):
            return await in_daemon_thread(examination)
    except TimeoutError:
        # Only names may be looked at: everything else would hang, too.
        above = [mount for mount in mount_table() if path.is_relative_to(mount.mount_point)]
        mount = max(above, key=lambda each: len(Path(each.mount_point).parts), default=None)
        where = f"{mount.type}, mounted on {mount.mount_point}" if mount else "unknown filesystem"
        return installation.finding(
            "no_answer",
            path=path,
            where=where,
            seconds=duration(seconds),
            point=quote(mount.mount_point) if mount else "",
        )
    except Exception as exc:  # noqa: BLE001 - a doctor does not faint
        error = f"{type(exc).__name__}: {printable(str(exc), QUOTED)}"
        return installation.finding("check_failed", path=path, error=error)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 1 if there is a problem, else 0."""
    return int(any(finding.severity == "problem" for finding in findings))
