"""The command line: arguments, logging, signals, exit codes. Everything else is the library."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import anyio
import typer

from mbcap_watch import __version__, config, inspection, logs, manual, options, output, progress
from mbcap_watch.ack import Ack
from mbcap_watch.errors import MbcapWatchError, SettingsError, SnapshotMalformed
from mbcap_watch.heartbeat import Heartbeat, Keeper
from mbcap_watch.metrics import Metrics
from mbcap_watch.notify import Notifier
from mbcap_watch.plan import Change
from mbcap_watch.result import PersistResult, WatchState
from mbcap_watch.service import persist_once, preview_once
from mbcap_watch.service import run as run_bridge
from mbcap_watch.signals import Stop
from mbcap_watch.snapshot import SNAPSHOT_NAME, parse_entries, write_snapshot
from mbcap_watch.statsfile import StatsFile

logger = logging.getLogger("mbcap_watch")

_NOTHING_TO_DO: Final = "there is no snapshot yet: nothing to do"

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
    max_bytes: options.MaxBytes = None,
    downgrade: options.Downgrade = None,
    ack: options.Ack = None,
    openmetrics_file: options.OpenMetricsFile = None,
    http: options.Http = None,
) -> None:
    """Watch and persist until SIGTERM or SIGINT (the daemon).

    Whatever is missing or broken, database, directory, columns or snapshot, is waited for. Ends
    with exit code 0 within 5 seconds of a signal.
    """
    stop = Stop()  # before anything else: from here on a signal ends it cleanly
    loaded = _configure(context)
    settings = loaded.settings
    notifier = Notifier(os.environ, settings)  # says nothing where nobody listens
    stop.on_stop(notifier.stopping)
    answers = Ack(settings) if loaded.ack else None
    log, state_log = logs.ResultLog(), logs.StateLog()
    metrics = Metrics(settings, version=__version__, pid=os.getpid())
    heartbeat = Heartbeat(_keepers(loaded), lambda: metrics.snapshot(time.time()))

    def on_state(state: WatchState) -> None:
        state_log(state)
        metrics.on_state(state)
        notifier.on_state(state)  # last: nothing that hangs may be taken for progress

    def on_result(result: PersistResult) -> None:
        log(result)
        metrics.on_result(result)
        notifier.on_result(result)
        if answers is not None:
            answers.on_result(result)  # returns at once
        if json:
            output.print_line(result.to_json())

    logger.info(
        "mbcap-watch %s: %s into %s",
        __version__,
        settings.snapshot_dir / SNAPSHOT_NAME,
        settings.database,
    )

    async def main() -> None:
        with anyio.CancelScope() as scope, heartbeat, answers or contextlib.nullcontext():
            stop.cancel_on_signal(scope)
            await run_bridge(
                settings,
                on_result=on_result,
                on_state=on_state,
                on_timings=metrics.on_timings,
            )

    anyio.run(main)
    log.end()
    state_log.end()
    logger.info("stopped")
    stop.ignore_more()


def _keepers(loaded: config.Config) -> list[Keeper]:
    """Return who keeps what the bridge tells of itself; prometheus-client only if it is needed."""
    keepers: list[Keeper] = [StatsFile(loaded.settings, os.environ)]
    wanted = next((name for name in ("openmetrics_file", "http") if getattr(loaded, name)), None)
    if wanted is None:
        return keepers
    try:
        from mbcap_watch import endpoint, exposition  # noqa: PLC0415 - they take 10 MB

        if loaded.openmetrics_file:
            keepers.append(exposition.PrometheusFile(loaded.openmetrics_file))
        if loaded.http:
            keepers.append(endpoint.Endpoint(*loaded.http))
    except ModuleNotFoundError as exc:
        problem = f"needs {exc.name}: pip install 'mbcap-watch[metrics]'"
        raise config.in_users_words(SettingsError(wanted, problem), loaded.origins) from exc
    except SettingsError as exc:
        raise config.in_users_words(exc, loaded.origins) from exc
    return keepers


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
    max_bytes: options.MaxBytes = None,
    downgrade: options.Downgrade = None,
) -> None:
    """Look once: apply the snapshot, then exit.

    On a terminal, a large snapshot shows a progress bar.
    """
    settings = _configure(context).settings
    if dry_run:
        result, changes = anyio.run(preview_once, settings)
        _print_preview(result, changes, as_json=json)
    else:
        with progress.shown(wanted=not json) as on_progress:
            result = anyio.run(partial(persist_once, settings, on_progress=on_progress))
        if json:
            output.print_line(result.to_json())
        elif result.outcome in ("applied", "unchanged"):
            output.print_line(logs.summary(result))
        elif result.outcome == "no_snapshot":
            output.print_line(_NOTHING_TO_DO)
    if result.error:
        logger.warning("%s: %s", result.outcome, result.error)
    raise typer.Exit(output.EXIT_CODES[result.outcome])


def _print_preview(
    result: PersistResult, changes: list[tuple[str, Change]], *, as_json: bool
) -> None:
    if as_json:
        fields = result.to_dict()
        fields["dry_run"] = True
        fields["changes"] = [
            {"table": table, "public_key": c.public_key, "from": c.before, "to": c.after}
            for table, c in changes
        ]
        output.print_json(fields)
        return
    for table, change in changes:
        before, after = (f"{sup}/{evidence!r}" for sup, evidence in (change.before, change.after))
        output.print_line(f"{table} {change.public_key} {before} -> {after}")
    if result.outcome in ("applied", "unchanged"):
        output.print_line(f"would change {len(changes)} rows; nothing was touched")
    elif result.outcome == "no_snapshot":
        output.print_line(_NOTHING_TO_DO)


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
        )
    except SnapshotMalformed as exc:
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
    from mbcap_watch import demo  # noqa: PLC0415 - its libraries take 2 MB that `run` can do without

    right = demo.main(nodes=nodes, snapshots=snapshots, mode=mode, poll_interval=poll_interval)
    raise typer.Exit(0 if right else 1)


inspection.register(app)


def _configure(context: typer.Context) -> config.Config:
    loaded = config.load(context.params, os.environ, context.params.get("config_file"))
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
