"""What the command line prints, and its exit codes."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

import typer

from mbcap_watch.errors import MbcapWatchError, printable

if TYPE_CHECKING:
    from mbcap_watch.result import Outcome

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


class OutputError(MbcapWatchError):
    """Standard output is gone, or its disk is full."""


def say(message: str) -> None:
    """Tell people, on standard error."""
    typer.echo(f"mbcap-watch: {printable(message)}", err=True)


def fail(message: str, code: int) -> NoReturn:
    """Tell people, and end with an exit code."""
    say(message)
    raise typer.Exit(code)
