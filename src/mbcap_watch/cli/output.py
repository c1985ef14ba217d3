"""What the command line prints, and its exit codes."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO

import click

from mbcap_watch.errors import QUOTED, MbcapWatchError, counted, printable, quoted
from mbcap_watch.telemetry.logs import summary

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import Console
    from rich.text import Text

    from mbcap_watch.bridge.sync import OnProgress
    from mbcap_watch.doctor.findings import Finding
    from mbcap_watch.results import Outcome, PersistResult
    from mbcap_watch.store.plan import Change

EXIT_USAGE: Final = 2
EXIT_BAD_SNAPSHOT: Final = 3
EXIT_CODES: Final[dict[Outcome, int]] = {
    "applied": 0,
    "unchanged": 0,
    "no_snapshot": 0,
    "malformed": EXIT_BAD_SNAPSHOT,
    "refused": EXIT_BAD_SNAPSHOT,
    "database_missing": 4,
    "schema_missing": 4,
    "foreign_wal": 4,
    "busy": 5,
    "failed": 1,
}


def print_json(fields: dict[str, Any]) -> None:
    """Print one JSON object on one line; its texts are made safe for a terminal."""
    print_line(json.dumps(_safe(fields), ensure_ascii=False, separators=(",", ":")))


def _safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _safe(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_safe(each) for each in value]
    return printable(value) if isinstance(value, str) else value


def print_line(text: str) -> None:
    """Print one line at once, in UTF-8 whatever the locale."""
    with written():
        sys.stdout.buffer.write(printable(text).encode() + b"\n")
        sys.stdout.buffer.flush()


@contextlib.contextmanager
def written() -> Iterator[None]:
    """Turn what goes wrong when standard output is written into an `OutputError`."""
    try:
        yield
    except (OSError, AttributeError) as exc:  # AttributeError: it was closed before we started
        raise OutputError(f"standard output cannot be written: {exc}") from exc


def print_config(values: Mapping[str, Any], origins: Mapping[str, str], *, as_json: bool) -> None:
    """Print settings, and where each came from."""
    if as_json:
        fields = {}
        for name, value in values.items():
            known = value if isinstance(value, int | float | None) else str(value)
            fields[name] = {"value": known, "origin": origins[name]}
        print_json(fields)
        return
    from rich.console import Console
    from rich.table import Table

    from mbcap_watch.cli.views import plain

    table, console = Table("setting", "value", "from"), Console(soft_wrap=True)
    for name, value in values.items():
        table.add_row(name, plain(str(value), console), plain(origins[name], console))
    with written():
        console.print(table)


def print_result(
    result: PersistResult, changes: list[tuple[str, Change]] | None, *, as_json: bool
) -> None:
    """Print what `apply` has done; with `changes`, those that it would make."""
    if as_json:
        fields = result.to_dict()
        if changes is not None:
            fields |= {"dry_run": True, "changes": [_as_json(*each) for each in changes]}
        print_json(fields)
        return
    for table, change in changes or ():
        before, after = ("/".join(map(quoted, value)) for value in (change.before, change.after))
        print_line(f"{table} {printable(change.public_key, QUOTED)} {before} -> {after}")
    if result.outcome == "no_snapshot":
        print_line("there is no snapshot yet: nothing to do")
    elif result.compared and changes is not None:
        print_line(f"would change {counted(len(changes), 'row', 'rows')}; nothing was touched")
    elif result.compared:
        print_line(summary(result))


def _as_json(table: str, change: Change) -> dict[str, Any]:
    def visible(value: object) -> object:  # any column may hold bytes or infinity
        if isinstance(value, str):
            return printable(value, QUOTED)
        return value if value is None or isinstance(value, int) else quoted(value)

    before, after = ([visible(each) for each in row] for row in (change.before, change.after))
    key = visible(change.public_key)
    return {"table": table, "public_key": key, "from": before, "to": after}


_STYLES: Final = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def print_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print the findings of `check`, each remedy on the line below, and a line that sums up.

    Long lines are left to the terminal, so that a remedy can be copied.
    """
    from rich.console import Console  # 17 ms and 2 MB that `run` can do without
    from rich.text import Text

    from mbcap_watch.cli.views import plain

    console = console or Console()

    def show(*parts: str | Text | tuple[str, str]) -> None:
        with written():
            console.print(Text.assemble(*parts), soft_wrap=True)

    width = max((len(finding.subject) for finding in findings), default=0)
    for each in findings:
        show(
            (f"{each.severity:8}", _STYLES[each.severity]),
            f"{each.subject:{width}}  ",
            plain(each.text, console),
        )
        if each.remedy:
            show(" " * (width + 10), ("-> ", "bold"), plain(each.remedy, console))
    counts = [
        counted(number, severity, f"{severity}s")
        for severity in ("problem", "warning")
        if (number := sum(each.severity == severity for each in findings))
    ]
    show(", ".join(counts) or "everything is in order")


class OutputError(MbcapWatchError):
    """Standard output is gone, or its disk is full."""


def say(message: str) -> None:
    """Print a message for people, on standard error."""
    click.echo(f"mbcap-watch: {printable(message)}", err=True)


def fail(message: str, code: int) -> NoReturn:
    """Print a message for people, on standard error, and end with an exit code."""
    say(message)
    raise click.exceptions.Exit(code)


# Less work is done before a person could read the bar.
_LARGE: Final = 50_000


@contextlib.contextmanager
def progress(*, wanted: bool) -> Iterator[OnProgress | None]:
    """Yield a hook that shows a bar on standard error for a large snapshot, if somebody sees it."""
    stderr: TextIO | None = sys.stderr  # None if it was closed before we started
    if not wanted or stderr is None or not stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("applying", total=None)

    def on_progress(done: int, total: int) -> None:
        if total > _LARGE:
            with contextlib.suppress(OSError):  # the terminal is gone: nobody sees it
                bar.start()  # has no effect the second time
                bar.update(task, completed=done, total=total)

    try:
        yield on_progress
    finally:
        with contextlib.suppress(OSError):
            bar.stop()
