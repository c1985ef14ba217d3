"""What the command line prints, and its exit codes."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

import typer

from mbcap_watch.errors import MbcapWatchError, printable

if TYPE_CHECKING:
    from mbcap_watch.plan import Change
    from mbcap_watch.result import Outcome, PersistResult

NOTHING_TO_DO: Final = "there is no snapshot yet: nothing to do"

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
    """Print one JSON object on one line."""
    print_line(json.dumps(fields, ensure_ascii=False, separators=(",", ":")))


def print_line(text: str) -> None:
    """Print at once, in UTF-8 whatever the locale."""
    try:
        sys.stdout.buffer.write(printable(text).encode() + b"\n")
        sys.stdout.buffer.flush()
    except (OSError, AttributeError) as exc:  # AttributeError: it was closed before we started
        raise OutputError(f"standard output cannot be written: {exc}") from exc


def print_preview(
    result: PersistResult, changes: list[tuple[str, Change]], *, as_json: bool
) -> None:
    """Print what `apply` would have done."""
    if as_json:
        fields = result.to_dict()
        fields["dry_run"] = True
        fields["changes"] = [
            {
                "table": table,
                "public_key": c.public_key,
                "from": [_as_json(value) for value in c.before],
                "to": c.after,
            }
            for table, c in changes
        ]
        print_json(fields)
        return
    for table, change in changes:
        before, after = (f"{sup}/{evidence!r}" for sup, evidence in (change.before, change.after))
        print_line(f"{table} {change.public_key} {before} -> {after}")
    if result.outcome in ("applied", "unchanged"):
        print_line(f"would change {len(changes)} rows; nothing was touched")
    elif result.outcome == "no_snapshot":
        print_line(NOTHING_TO_DO)


def _as_json(value: object) -> object:
    """Return what was in a column, as JSON: SQLite takes bytes and infinity in any."""
    return value if value is None or isinstance(value, int | str) else repr(value)


class OutputError(MbcapWatchError):
    """Standard output is gone, or its disk is full."""


def say(message: str) -> None:
    """Tell people, on standard error."""
    typer.echo(f"mbcap-watch: {printable(message)}", err=True)


def fail(message: str, code: int) -> NoReturn:
    """Tell people, and end with an exit code."""
    say(message)
    raise typer.Exit(code)
