"""The command line: arguments, output, exit codes. Everything else is elsewhere."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import anyio
import typer

from mbcap_watch import __version__
from mbcap_watch.bridge.run import persist_once, preview_once
from mbcap_watch.cli import config, inspection, manual, options, output, progress
from mbcap_watch.cli import run as daemon
from mbcap_watch.cli.signals import Stop
from mbcap_watch.errors import MbcapWatchError, SettingsError, SnapshotMalformed, SnapshotRefused
from mbcap_watch.results import PersistResult
from mbcap_watch.snapshot.files import SNAPSHOT_NAME, parse_entries, write_snapshot
from mbcap_watch.telemetry import logs

logger = logging.getLogger("mbcap_watch")

app = typer.Typer(
    name="mbcap-watch",
    help="Persist CoreScope's multi-byte capability snapshots the moment they are published.",
    epilog=manual.MAIN,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text: nothing of it is cut off at 80 columns, or in a pager
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"mbcap-watch {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command(epilog=manual.RUN)
def run(
    context: typer.Context,
    database: options.Database = None,
    snapshot_dir: options.SnapshotDir = None,
    config_file: options.ConfigFile = None,
    json: options.Json = False,
    log_level: options.LogLevel = None,
    log_format: options.LogFormat = None,
    mode: options.Mode = None,
    poll_interval: options.PollInterval = None,
    sweep_interval: options.SweepInterval = None,
    resync: options.Resync = None,
    debounce: options.Debounce = None,
    max_wait: options.MaxWait = None,
    batch_rows: options.BatchRows = None,
    busy_deadline: options.BusyDeadline = None,
    wal_grace: options.WalGrace = None,
    max_bytes: options.MaxBytes = None,
    downgrade: options.Downgrade = None,
    ack: options.Ack = None,
    http: options.Http = None,
) -> None:
    """Watch and persist until SIGTERM or SIGINT (the daemon).

    Whatever is missing or broken, database, directory, columns or snapshot, is waited for. Ends
    with exit code 0 within 5 seconds of a signal.
    """
    stop = Stop()  # first: until here a signal ends the process at once (__main__)
    daemon.serve(_load(context), stop, as_json=json)


@app.command(epilog=manual.APPLY)
def apply(
    context: typer.Context,
    database: options.Database = None,
    snapshot_dir: options.SnapshotDir = None,
    config_file: options.ConfigFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would change, and touch nothing.")
    ] = False,
    json: options.Json = False,
    log_level: options.LogLevel = None,
    log_format: options.LogFormat = None,
    mode: options.Mode = None,
    poll_interval: options.PollInterval = None,
    sweep_interval: options.SweepInterval = None,
    resync: options.Resync = None,
    debounce: options.Debounce = None,
    max_wait: options.MaxWait = None,
    batch_rows: options.BatchRows = None,
    busy_deadline: options.BusyDeadline = None,
    wal_grace: options.WalGrace = None,
    max_bytes: options.MaxBytes = None,
    downgrade: options.Downgrade = None,
) -> None:
    """Look once: apply the snapshot, then exit.

    On a terminal, a large snapshot shows a progress bar.
    """
    settings = _configure(context).settings
    if dry_run:
        result, changes = anyio.run(preview_once, settings)
        output.print_preview(result, changes, as_json=json)
    else:
        with progress.shown(wanted=not json) as on_progress:
            result = anyio.run(partial(persist_once, settings, on_progress=on_progress))
        if json:
            output.print_line(result.to_json())
        elif result.outcome in ("applied", "unchanged"):
            output.print_line(logs.summary(result))
        elif result.outcome == "no_snapshot":
            output.print_line(output.NOTHING_TO_DO)
    if result.error:
        logger.warning("%s: %s", result.outcome, result.error)
    raise typer.Exit(output.EXIT_CODES[result.outcome])


@app.command(epilog=manual.PUBLISH)
def publish(
    context: typer.Context,
    file: Annotated[
        str, typer.Argument(metavar="FILE|-", help="A snapshot or a bare list of entries, as JSON.")
    ],
    database: options.Database = None,
    snapshot_dir: options.SnapshotDir = None,
    config_file: options.ConfigFile = None,
    json: options.Json = False,
    log_level: options.LogLevel = None,
    log_format: options.LogFormat = None,
) -> None:
    """Validate a snapshot and publish it atomically.

    The database is not opened; its path only tells where the snapshot directory is.
    """
    settings = _configure(context).settings
    source = "standard input" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, AttributeError) as exc:  # AttributeError: it was closed before we started
        output.fail(f"{source}: cannot be read: {exc}", output.EXIT_USAGE)
    try:
        snapshot = write_snapshot(
            settings.database,
            parse_entries(data, source=source),
            snapshot_dir=settings.snapshot_dir,
            max_bytes=settings.max_bytes,
        )
    except (SnapshotMalformed, SnapshotRefused) as exc:
        output.fail(f"{source}: {exc.problem}; nothing was published", output.EXIT_BAD_SNAPSHOT)
    except MbcapWatchError as exc:
        output.fail(str(exc), 1)
    path = settings.snapshot_dir / SNAPSHOT_NAME
    if json:
        fields = {
            "path": str(path),
            "entries": len(snapshot.entries),
            "written_at": snapshot.written_at,
        }
        output.print_json(fields)
    else:
        output.print_line(
            f"published {len(snapshot.entries)} entries to {path}, written at {snapshot.written_at}"
        )


@app.command(name="demo", epilog=manual.DEMO)
def demo_command(
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the synthetic mesh.")] = 2400,
    snapshots: Annotated[int, typer.Option(min=1, help="Snapshots to publish.")] = 12,
    mode: Annotated[str, typer.Option(metavar="auto|inotify|poll", help="How to watch.")] = "auto",
    poll_interval: Annotated[
        str, typer.Option(metavar="DURATION", help="Between two looks when polling.")
    ] = "1s",
) -> None:
    """Show the whole chain at work on generated data.

    In a temporary directory, another process publishes a series of changing snapshots; each is
    timed from its rename to its committed rows.
    """
    from mbcap_watch.cli import demo  # noqa: PLC0415 - its libraries take 2 MB that `run` can do without

    right = demo.main(nodes=nodes, snapshots=snapshots, mode=mode, poll_interval=poll_interval)
    raise typer.Exit(0 if right else 1)


inspection.register(app)


def _load(context: typer.Context) -> config.Config:
    return config.load(context.params, os.environ, context.params.get("config_file"))


def _configure(context: typer.Context) -> config.Config:
    loaded = _load(context)
    logs.configure(loaded.log_level, loaded.log_format)
    return loaded


def main() -> None:
    """Run the command line; every error becomes one line and an exit code."""
    try:
        app()
    except SettingsError as exc:
        output.say(str(exc))
        _print_refusal(str(exc))
        sys.exit(output.EXIT_USAGE)
    except output.OutputError as exc:
        output.say(str(exc))
        # What Python still holds for a standard output that is gone is not to be tried again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except SystemExit as exc:
        if exc.code == output.EXIT_USAGE:
            _print_refusal("wrong usage; standard error says what")
        raise


def _print_refusal(message: str) -> None:
    """Print an object for `apply --json` even when there was no look to report."""
    if {"apply", "--json"} <= set(sys.argv):
        output.print_line(PersistResult(outcome="failed", reason="once", error=message).to_json())
