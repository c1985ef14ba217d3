"""`mbcap-watch check`: what is wrong with an installation, and what to do about it.

Nothing is changed, nothing is raised, and what does not answer is left behind after some seconds.
"""

from __future__ import annotations

import asyncio
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import anyio
from rich.text import Text

from mbcap_watch import (
    check_contents,
    check_database,
    check_host,
    check_service,
    check_snapshot,
)
from mbcap_watch.errors import QUOTED, printable
from mbcap_watch.finding import Finding, problem
from mbcap_watch.mounts import mount_table
from mbcap_watch.status import plain
from mbcap_watch.watcher import Watch
from mbcap_watch.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from rich.console import Console

    from mbcap_watch.plan import Value
    from mbcap_watch.settings import Settings

T = TypeVar("T")

# How long a look at files, or into them, may take before it counts as hung.
FILE_SECONDS: Final = 5.0
DATA_SECONDS: Final = 15.0

# Where the stats files are, for the line about a filesystem that does not answer.
RUNTIME: Final = Path("/dev/shm")  # noqa: S108 - only a name


async def examine(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """Examine an installation: the database, the snapshot, the watch, and who else is there.

    Args:
        settings: as `run` would have them.
        environ: the environment, for hints at a wrong path.

    """
    database, directory = settings.database, settings.snapshot_dir
    outside, snapshot = await asyncio.gather(
        _ask(database, FILE_SECONDS, _in_thread(check_database.examine, database, environ)),
        _ask(directory, DATA_SECONDS, _in_thread(check_snapshot.examine, settings)),
    )
    parts = [outside]
    values: dict[str, Value] = {}
    if not isinstance(snapshot, Finding):  # what does not answer is not asked again
        found, values = snapshot
        parts += [found, await _ask(directory, FILE_SECONDS, _watch(settings))]
    else:
        parts.append(snapshot)
    if not isinstance(outside, Finding):
        parts += await asyncio.gather(
            _ask(database, DATA_SECONDS, _in_thread(check_contents.examine, settings, values)),
            _ask(database, FILE_SECONDS, _in_thread(check_host.examine, database)),
        )
    findings = _flat(parts)
    ask = partial(check_service.examine, explained=exit_code(findings) == 1)
    service = await _ask(RUNTIME, FILE_SECONDS, _in_thread(ask, settings, environ))
    return findings + _flat([service])


def _flat(parts: Iterable[list[Finding] | Finding]) -> list[Finding]:
    return [each for part in parts for each in ([part] if isinstance(part, Finding) else part)]


async def _watch(settings: Settings) -> list[Finding]:
    """Do what `run` does at its start, and undo it."""
    async with Worker() as worker:
        watch = Watch(settings, worker, lambda: None)
        await worker.call(watch.refresh)
        return await worker.call(check_snapshot.examine_watch, settings, watch.state)


async def _in_thread(function: Callable[..., T], *args: object) -> T:
    async with Worker() as worker:
        return await worker.call(function, *args)


async def _ask(path: Path, seconds: float, examination: Awaitable[T]) -> T | Finding:
    """Wait for an examination of what is at `path`; what goes wrong with it is a finding."""
    try:
        with anyio.fail_after(seconds):
            return await examination
    except TimeoutError:
        # Only names may be looked at: everything else would hang, too.
        above = [mount for mount in mount_table() if path.is_relative_to(mount.mount_point)]
        mount = max(above, key=lambda each: len(Path(each.mount_point).parts), default=None)
        where = f"{mount.type}, mounted on {mount.mount_point}" if mount else "unknown filesystem"
        point = f" {shlex.quote(mount.mount_point)}" if mount else ""
        remedy = f"bring the server of that filesystem back, or unmount it (umount -f -l{point});"
        return problem(
            "filesystem",
            f"{path} ({where}) did not answer within {seconds:g} s",
            f"{remedy} if it is a local disk: dmesg, for it may be failing",
        )
    except Exception as exc:  # noqa: BLE001 - a doctor does not faint
        text = f"examining {path} failed: {type(exc).__name__}: {printable(str(exc), QUOTED)}"
        return problem("check", text, "the other lines stand; please report this one")


# ------------------------------------------------------------------------------ telling

_STYLES: Final = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def render(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings, with the remedy on the line below, and a line that sums up.

    Long lines are left to the terminal, so that a remedy can be copied.
    """

    def show(*parts: str | Text | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts), soft_wrap=True)

    width = max((len(finding.subject) for finding in findings), default=0)
    for each in findings:
        show(
            (f"{each.level:8}", _STYLES[each.level]),
            f"{each.subject:{width}}  ",
            plain(each.text, console),
        )
        if each.remedy:
            show(" " * (width + 10), ("-> ", "bold"), plain(each.remedy, console))
    counts = [
        f"{number} {level}{'s' if number > 1 else ''}"
        for level in ("problem", "warning")
        if (number := sum(each.level == level for each in findings))
    ]
    show(", ".join(counts) or "everything is in order")


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 1 if there is a problem, else 0."""
    return int(any(finding.level == "problem" for finding in findings))
