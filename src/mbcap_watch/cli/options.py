"""The options of the command line, each written down once. Their names are the settings' names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, get_args

import typer

from mbcap_watch.cli import config

Options = Mapping[str, Any]


def takes(*groups: Options) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options; it finds their values in `context.params`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        named = [each for each in signature.parameters.values() if each.kind != each.VAR_KEYWORD]
        named += [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if get_args(option)[0] is bool else None,
                annotation=option,
            )
            for group in groups
            for name, option in group.items()
        ]
        command.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
        return command

    return decorate


def _option(metavar: str, help: str, *names: str) -> Any:
    complete = _completer(metavar.split("|")) if "|" in metavar else None
    option = typer.Option(
        *names, metavar=metavar, help=help, show_default=False, autocompletion=complete
    )
    return Annotated[str | None, option]


def _completer(values: list[str]) -> Callable[[str], list[str]]:
    """Return a function that completes the values of an option for a shell."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


PATHS: Final[Options] = {
    "database": _option(
        "PATH",
        "The SQLite database, else DB_PATH from the environment, else data/meshcore.db. Never"
        " created.",
    ),
    "snapshot_dir": _option(
        "DIR", "Where snapshot.json is. Default: mbcap-snapshot beside the database."
    ),
    "config_file": _option("FILE", "A TOML file with settings.", "--config"),
}
JSON: Final[Options] = {
    "json": Annotated[
        bool, typer.Option("--json", help="Print one JSON object per result on standard output.")
    ]
}
LOG: Final[Options] = {
    "log_level": _option("|".join(config.LOG_LEVELS), "Default: info."),
    "log_format": _option(
        "|".join(config.LOG_FORMATS), "How to log on standard error. Default: text."
    ),
}
SETTINGS: Final[Options] = {
    "mode": _option(
        "auto|inotify|poll",
        "How changes are noticed; auto uses inotify where the filesystem delivers it."
        " Default: auto.",
    ),
    "poll_interval": _option("DURATION", "Between two syncs when polling. Default: 1s."),
    "sweep_interval": _option(
        "DURATION", "Between checks for a dead watch or a missed change. Default: 5s."
    ),
    "resync": _option(
        "DURATION",
        "Between comparisons with the database although the file did not change. Default: 5m.",
    ),
    "debounce": _option("DURATION", "Quiet that a burst of changes is given. Default: 100ms."),
    "max_wait": _option("DURATION", "How long a burst can postpone a sync. Default: 1s."),
    "batch_rows": _option("ROWS", "Rows written per hold of the write lock. Default: 500."),
    "busy_deadline": _option("DURATION", "How long to try a locked database. Default: 30s."),
    "wal_grace": _option(
        "DURATION",
        "How long to leave a -wal alone that nobody has open, before it is recovered. Default: 1m.",
    ),
    "max_bytes": _option("SIZE", "Refuse larger snapshots. Default: 12MiB."),
    "downgrade": _option(
        "allow|never", "Whether suspected may replace a stored confirmed. Default: allow."
    ),
}
DAEMON: Final[Options] = {
    "ack": Annotated[
        bool | None,
        typer.Option(
            "--ack",
            help="Answer the publisher: what became of its snapshot, in result.json beside it.",
            show_default=False,
        ),
    ],
    "http": _option(
        "ADDRESS:PORT",
        "Serve /metrics and /healthz here, as 127.0.0.1:9464. No port is opened without it. Needs"
        " the extra `metrics`.",
    ),
}
MAX_AGE: Final[Options] = {
    "max_age": _option(
        "DURATION",
        "Unhealthy if the database was last compared longer ago; give it more than the resync."
        " Default: three times the resync and 5m.",
    )
}
OUT: Final[Options] = {
    "out": _option("FILE.svg", "Where to. Default: standard output.", "-o", "--out")
}
