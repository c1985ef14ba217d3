"""The options of the command line, each written down once. Their names are the settings' names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mbcap_watch.cli import config


def _option(*names: str, metavar: str, help: str) -> Any:
    complete = _completer(metavar.split("|")) if "|" in metavar else None
    return typer.Option(
        *names, metavar=metavar, help=help, show_default=False, autocompletion=complete
    )


def _setting(metavar: str, help: str) -> Any:
    return _option(metavar=metavar, help=help)


def _completer(values: list[str]) -> Callable[[str], list[str]]:
    """Return what tells a shell of the values of an option."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


Text = str | None
ConfigFile = Annotated[
    Path | None, _option("--config", metavar="FILE", help="A TOML file with settings.")
]
Database = Annotated[
    Text,
    _option(
        "--database",
        metavar="PATH",
        help="The SQLite database, else DB_PATH from the environment, else data/meshcore.db. Never"
        " created.",
    ),
]
SnapshotDir = Annotated[
    Text,
    _option(
        "--snapshot-dir",
        metavar="DIR",
        help="Where snapshot.json is. Default: mbcap-snapshot beside the database.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per result on standard output.")
]
LogLevel = Annotated[
    Text, _option("--log-level", metavar="|".join(config.LOG_LEVELS), help="Default: info.")
]
LogFormat = Annotated[
    Text,
    _option(
        "--log-format",
        metavar="|".join(config.LOG_FORMATS),
        help="How to log on standard error. Default: text.",
    ),
]
Mode = Annotated[
    Text,
    _setting(
        "auto|inotify|poll",
        "How changes are noticed; auto uses inotify where the filesystem delivers it"
        ". Default: auto.",
    ),
]
PollInterval = Annotated[Text, _setting("DURATION", "Between two looks when polling. Default: 1s.")]
SweepInterval = Annotated[
    Text,
    _setting("DURATION", "Between checks for a dead watch or a missed change. Default: 5s."),
]
Resync = Annotated[
    Text,
    _setting(
        "DURATION",
        "Between comparisons with the database although the file did not change. Default: 5m.",
    ),
]
Debounce = Annotated[
    Text, _setting("DURATION", "Quiet that a burst of changes is given. Default: 100ms.")
]
MaxWait = Annotated[
    Text, _setting("DURATION", "How long a burst can postpone a look. Default: 1s.")
]
BatchRows = Annotated[
    Text, _setting("ROWS", "Rows written per hold of the write lock. Default: 500.")
]
BusyDeadline = Annotated[
    Text, _setting("DURATION", "How long to try a locked database. Default: 30s.")
]
WalGrace = Annotated[
    Text,
    _setting(
        "DURATION",
        "How long to leave a -wal alone that nobody has open, before it is recovered. Default: 1m.",
    ),
]
MaxBytes = Annotated[Text, _setting("SIZE", "Refuse larger snapshots. Default: 256MiB.")]
Downgrade = Annotated[
    Text,
    _setting("allow|never", "Whether suspected may replace a stored confirmed. Default: allow."),
]
Http = Annotated[
    Text,
    _option(
        "--http",
        metavar="ADDRESS:PORT",
        help="Serve /metrics and /healthz here, as 127.0.0.1:9464. No port is opened without it."
        " Needs the extra `metrics`.",
    ),
]
MaxAge = Annotated[
    Text,
    _option(
        "--max-age",
        metavar="DURATION",
        help="Unhealthy if the database was last compared longer ago; give it more than the resync."
        " Default: three times the resync and 5m.",
    ),
]
Ack = Annotated[
    bool | None,
    typer.Option(
        "--ack",
        help="Answer the publisher: what became of its snapshot, in result.json beside it.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    _option("-o", "--out", metavar="FILE.svg", help="Where to. Default: standard output."),
]
