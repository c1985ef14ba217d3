"""The commands, and the way from an error to an exit code."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import click
import msgspec

from mbcap_watch.bridge.run import persist_once, preview_once
from mbcap_watch.cli import config, output
from mbcap_watch.cli import run as daemon
from mbcap_watch.cli.options import AS_JSON, app, command
from mbcap_watch.cli.signals import Stop
from mbcap_watch.errors import MbcapWatchError, SettingsError, SnapshotMalformed, SnapshotRefused
from mbcap_watch.results import PersistResult
from mbcap_watch.settings import SETTING_NAMES, Duration, Settings
from mbcap_watch.snapshot.files import SNAPSHOT_NAME, parse_entries, write_snapshot
from mbcap_watch.telemetry import logs

if TYPE_CHECKING:
    from mbcap_watch.doctor.health import Health
    from mbcap_watch.telemetry.stats import Stats

__all__ = ["app", "main"]

logger = logging.getLogger("mbcap_watch")

_PATHS: Final = ("database", "snapshot_dir")
_MAX_AGE: Final = Duration(
    "",
    "100ms",
    "Unhealthy if the last comparison is older. Default: three times the resync and 5m.",
)


def _load(given: dict[str, Any]) -> config.Config:
    return config.load(given, os.environ, given["config"])


# ------------------------------------------------------------------------------ they write


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
    daemon.serve(_load(given), stop, as_json=as_json)


@command(
    "apply",
    *(*_PATHS, "batch_rows", "busy_deadline", "wal_grace", "max_bytes", "downgrade"),
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
      4  the database, or every table with both columns, is missing
      5  still busy at --busy-deadline
    """
    loaded = _load(given)
    logs.configure(loaded.log_level, loaded.log_format)
    if dry_run:
        result, changes = anyio.run(preview_once, loaded.settings)
        output.print_preview(result, changes, as_json=as_json)
    else:
        with output.progress(wanted=not as_json) as on_progress:
            result = anyio.run(partial(persist_once, loaded.settings, on_progress=on_progress))
        if as_json:
            output.print_line(result.to_json())
        elif result.outcome in ("applied", "unchanged"):
            output.print_line(logs.summary(result))
        elif result.outcome == "no_snapshot":
            output.print_line(output.NOTHING_TO_DO)
    if result.error:
        logger.warning("%s: %s", result.outcome, result.error)
    return output.EXIT_CODES[result.outcome]


@command("publish", *_PATHS, "max_bytes")
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
    settings = _load(given).settings
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
    path, count, at = (
        settings.snapshot_dir / SNAPSHOT_NAME,
        len(snapshot.entries),
        snapshot.written_at,
    )
    if as_json:
        output.print_json({"path": str(path), "entries": count, "written_at": at})
    else:
        output.print_line(f"published {count} entries to {path}, written at {at}")


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


# ------------------------------------------------------------------------------ they only read


@command("config", *config.DECLARED)
@AS_JSON
def show_config(*, as_json: bool, **given: Any) -> None:
    """Print the settings in effect, and where each came from.

    Examples:
      mbcap-watch config --config /etc/mbcap-watch/mbcap-watch.toml

    Exit codes:
      0  the settings are usable
      2  usage or configuration
    """
    loaded = _load(given)
    values = {
        name: getattr(loaded.settings if name in SETTING_NAMES else loaded, name)
        for name in config.DECLARED
    }
    output.print_config(values, loaded.origins, as_json=as_json)


@command("status", *_PATHS)
@AS_JSON
@click.option("--max-age", metavar=_MAX_AGE.metavar, help=_MAX_AGE.help)
def status(*, as_json: bool, max_age: str | None, **given: Any) -> int:
    """Tell how the running bridge is, and what to do if it is not well.

    Finds it by its settings, however it was started; where none are given, the only one that runs.

    Examples:
      mbcap-watch status --json --max-age 15m
      docker exec CONTAINER mbcap-watch status
      sudo -u corescope mbcap-watch status --database /app/data/meshcore.db

    Exit codes:
      0  healthy; there may be warnings
      1  not healthy, not running, or another user's
      2  usage or configuration
    """
    from mbcap_watch.doctor import status as shown

    most = None if max_age is None else _MAX_AGE.read("--max-age", max_age)
    stats, health = _look(_load(given), most)
    if as_json:
        output.print_json(shown.as_json(stats, health))
    else:
        from rich.console import Console

        with output.written():
            shown.render(stats, health, Console())
    return 0 if health.healthy else 1


@command("check", *_PATHS, "mode", "max_bytes", "downgrade")
@AS_JSON
def check(*, as_json: bool, **given: Any) -> int:
    """Examine the installation; say what is wrong and what to do.

    Changes nothing. Run it as the user that runs the service.

    Examples:
      sudo -u corescope mbcap-watch check --database /app/data/meshcore.db

    Exit codes:
      0  no problem; there may be warnings
      1  at least one problem
      2  usage or configuration
    """
    from mbcap_watch.doctor import check as doctor

    loaded = _load(given)
    findings = anyio.run(doctor.examine, loaded.settings, os.environ, loaded.file)
    code = doctor.exit_code(findings)
    if as_json:
        output.print_json({"ok": not code, "findings": msgspec.to_builtins(findings)})
    else:
        output.print_findings(findings)
    return code


@command("top", *_PATHS)
def show_top(**given: Any) -> None:
    """Show live how the running bridge is.

    q or Ctrl-C quits. Without a terminal, it prints what there is once.

    Examples:
      ssh -t HOST mbcap-watch top --database /app/data/meshcore.db

    Exit codes:
      0  ended by q or Ctrl-C; or printed once
      2  usage or configuration
    """
    from mbcap_watch.cli import top

    loaded = _load(given)
    top.show(lambda: _look(loaded))


@command("plot", *_PATHS)
@click.option("-o", "--out", metavar="FILE.svg", help="Where to. Default: standard output.")
def show_plot(*, out: str | None, **given: Any) -> None:
    """Draw lag and lock holds of the latest results, as an SVG.

    Examples:
      mbcap-watch plot -o lags.svg

    Exit codes:
      0  drawn
      1  nothing runs, or the file cannot be written
      2  usage or configuration
    """
    from mbcap_watch.cli import plot

    stats, health = _look(_load(given))
    if stats is None:
        output.fail((health.problems or health.warnings)[0].text, 1)
    drawing = plot.svg(stats)
    if out is None:
        for line in drawing.splitlines():
            output.print_line(line)
        return
    try:
        Path(out).write_text(drawing, encoding="utf-8")
    except OSError as exc:
        output.fail(f"{out}: cannot be written: {exc.strerror}", 1)


def _look(loaded: config.Config, max_age: float | None = None) -> tuple[Stats | None, Health]:
    """Ask the daemon with these settings; if they name no database, else the only one there is."""
    from mbcap_watch.doctor import service
    from mbcap_watch.telemetry.ask import ask

    stats, health = service.look(loaded.settings, os.environ, max_age)
    if health.state == "not running" and {loaded.origins[name] for name in _PATHS} == {"default"}:
        others = [
            peer.stats
            for peer in ask(loaded.settings, os.environ, everyone=True)
            if peer.stats and peer.uid in (0, os.geteuid())  # anybody can offer a socket
        ]
        if len(others) == 1:
            its = Settings(others[0].database, others[0].snapshot_dir)
            return service.look(its, os.environ, max_age)
    return stats, health


# ------------------------------------------------------------------------------ the way out


def main() -> None:
    """Run the command line; every error becomes one line and an exit code."""
    try:
        sys.exit(app.main(prog_name="mbcap-watch", standalone_mode=False))
    except SettingsError as exc:
        _refuse(str(exc))
    except click.ClickException as exc:
        _refuse(exc.format_message())
    except click.Abort:
        sys.exit(1)
    except output.OutputError as exc:
        output.say(str(exc))
        # Else Python, while it ends, tries again to write what is left in its buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)


def _refuse(problem: str) -> None:
    """Say what is wrong; print an object for `apply --json` although there was no sync."""
    output.say(problem)
    if {"apply", "--json"} <= set(sys.argv):
        output.print_line(PersistResult(outcome="failed", reason="once", error=problem).to_json())
    sys.exit(output.EXIT_USAGE)
