"""The commands, and the way from an error to an exit code."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any

import anyio
import click

from mbcap_watch import __version__, errors
from mbcap_watch.bridge.run import persist_once, preview_once
from mbcap_watch.cli import config, inspection, output
from mbcap_watch.cli import run as daemon
from mbcap_watch.cli.options import AS_JSON, PATHS, command, load
from mbcap_watch.cli.signals import Stop
from mbcap_watch.doctor.findings import Installation
from mbcap_watch.doctor.health import explain
from mbcap_watch.results import PersistResult
from mbcap_watch.snapshot.files import SNAPSHOT_NAME, parse_entries, write_snapshot
from mbcap_watch.telemetry import logs

logger = logging.getLogger("mbcap_watch")


@command("run", *config.DECLARED)
@AS_JSON
def run(*, as_json: bool, **given: Any) -> None:
    """Watch and persist until SIGTERM or SIGINT (the daemon).

    Whatever is missing or broken, database, directory, columns or snapshot, is waited for.

    Examples:
      mbcap-watch run --database /app/data/meshcore.db
      mbcap-watch run --snapshot-dir /mnt/nfs/mbcap-snapshot --poll-interval 5s
      DB_PATH=/app/data/meshcore.db mbcap-watch run --json 2>run.log

    Exit codes:
      0  ended by SIGTERM or SIGINT, within 5 seconds
      1  standard output, written with --json, is gone
      2  usage or configuration
    """
    stop = Stop()  # first: until here a signal ends the process at once (__main__)
    daemon.serve(load(given), stop, as_json=as_json)


@command(
    "apply",
    *(*PATHS, "batch_rows", "busy_deadline", "wal_grace", "max_bytes", "downgrade"),
    *("log_level", "log_format"),
)
@AS_JSON
@click.option("--dry-run", is_flag=True, help="Show what would change, and touch nothing.")
def apply(*, as_json: bool, dry_run: bool, **given: Any) -> int:
    """Sync once: apply the snapshot, then exit.

    On a terminal, a large snapshot shows a progress bar.

    Examples:
      mbcap-watch apply --dry-run --database /app/data/meshcore.db
      mbcap-watch apply --json --busy-deadline 5s

    Exit codes:
      0  applied, unchanged, or no snapshot yet
      1  anything else, such as a database that cannot be written
      2  usage or configuration
      3  the snapshot is malformed or refused
      4  the database, or every table with both columns, is missing; or
         the -wal is another file's
      5  still busy at --busy-deadline
    """
    loaded = load(given)
    logs.configure(loaded.log_level, loaded.log_format)
    changes = None
    if dry_run:
        result, changes = anyio.run(preview_once, loaded.settings)
    else:
        with output.progress(wanted=not as_json) as on_progress:
            result = anyio.run(partial(persist_once, loaded.settings, on_progress=on_progress))
    output.print_result(result, changes, as_json=as_json)
    found = explain(result, Installation.of(loaded.settings, loaded.file))
    if result.error and found:
        logger.warning("%s: %s; %s", found.code, found.text, found.remedy)
    return output.EXIT_CODES[result.outcome]


@command("publish", *PATHS, "max_bytes")
@AS_JSON
@click.argument("file", metavar="FILE|-")
def publish(*, file: str, as_json: bool, **given: Any) -> None:
    """Validate a snapshot and publish it atomically.

    FILE is a snapshot or a bare list of entries, as JSON. The database is not opened.

    Examples:
      mbcap-watch publish snapshot.json --database /app/data/meshcore.db
      echo '[{"public_key": "5f3a", "status": "confirmed"}]' |
          mbcap-watch publish - --snapshot-dir /app/data/mbcap-snapshot

    Exit codes:
      0  published
      1  it could not be written or renamed into place
      2  usage or configuration
      3  it is no snapshot; nothing was published
    """
    settings = load(given).settings
    source = "standard input" if file == "-" else file
    try:
        with nullcontext(sys.stdin.buffer) if file == "-" else open(file, "rb") as stream:
            data = stream.read(settings.max_bytes + 1)
    except (OSError, AttributeError) as exc:  # AttributeError: it was closed before we started
        why = getattr(exc, "strerror", None) or "it is closed"
        output.fail(f"{source}: cannot be read: {why}", output.EXIT_USAGE)
    if len(data) > settings.max_bytes:
        problem = f"larger than max_bytes ({settings.max_bytes} bytes); nothing was published"
        output.fail(f"{source}: {problem}", output.EXIT_BAD_SNAPSHOT)
    try:
        snapshot = write_snapshot(
            settings.database,
            parse_entries(data, source=source),
            snapshot_dir=settings.snapshot_dir,
            max_bytes=settings.max_bytes,
        )
    except (errors.SnapshotMalformed, errors.SnapshotRefused) as exc:
        output.fail(f"{source}: {exc.problem}; nothing was published", output.EXIT_BAD_SNAPSHOT)
    except errors.MbcapWatchError as exc:
        output.fail(str(exc), 1)
    path, count = str(settings.snapshot_dir / SNAPSHOT_NAME), len(snapshot.entries)
    if as_json:
        stamp = snapshot.written_at
        output.print_json({"path": path, "entries": count, "written_at": stamp})
    else:
        entries = errors.counted(count, "entry", "entries")
        output.print_line(f"published {entries} to {path}, written at {snapshot.written_at}")


@command("demo", "mode", "poll_interval", configured=False)
@click.option(
    "--nodes", metavar="NUMBER", default=2400, type=click.IntRange(1), help="Of the mesh."
)
@click.option(
    "--snapshots", metavar="NUMBER", default=12, type=click.IntRange(1), help="To publish."
)
def demo(**given: Any) -> int:
    """Show the whole chain at work on generated data.

    In a temporary directory, another process publishes a series of changing snapshots; each is
    timed from its rename to its committed rows.

    Examples:
      mbcap-watch demo --nodes 100000 --snapshots 3 --mode poll

    Exit codes:
      0  every row is right
      1  one is not, or a snapshot did not arrive
      2  usage
    """
    from mbcap_watch.cli.demo import main  # its libraries take 2 MB that `run` can do without

    return 0 if main(**given) else 1


class _Group(click.Group):
    def list_commands(self, _: click.Context) -> list[str]:
        return list(self.commands)  # in the order in which they are written


@click.group(
    cls=_Group,
    commands={str(each.name): each for each in (run, apply, publish, demo, *inspection.COMMANDS)},
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    epilog="""\b
COMMAND --help says more. Completion, in ~/.bashrc (zsh: zsh_source), fish:
  eval "$(_MBCAP_WATCH_COMPLETE=bash_source mbcap-watch)"
  _MBCAP_WATCH_COMPLETE=fish_source mbcap-watch | source""",
)
@click.version_option(__version__, message="mbcap-watch %(version)s", help="Print the version.")
@click.pass_context
def app(context: click.Context) -> int | None:
    """Persist CoreScope's multi-byte capability snapshots when they are published."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        return output.EXIT_USAGE
    return None


def main() -> None:
    """Run the command line; every error becomes one line and an exit code."""
    try:
        sys.exit(_run())
    except output.OutputError as exc:
        output.say(str(exc))
        # Else Python, while it ends, tries again to write what is left in its buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)


def _run() -> int:
    try:
        return app.main(prog_name="mbcap-watch", standalone_mode=False) or 0
    except click.Abort:
        return 1
    except (errors.SettingsError, click.ClickException) as exc:
        problem = exc.format_message() if isinstance(exc, click.ClickException) else str(exc)
    output.say(problem)
    if {"apply", "--json"} <= set(sys.argv):  # an object even though there was no sync
        output.print_line(PersistResult(outcome="failed", reason="once", error=problem).to_json())
    return output.EXIT_USAGE
