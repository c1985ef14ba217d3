"""The commands that only read: the settings, how a daemon does, what is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import click
import msgspec

from mbcap_watch.cli import config, output
from mbcap_watch.cli.options import AS_JSON, PATHS, command, load
from mbcap_watch.settings import SETTING_NAMES, Duration

if TYPE_CHECKING:
    from mbcap_watch.doctor.health import Health
    from mbcap_watch.telemetry.stats import Stats

_MAX_AGE: Final = Duration(
    "",
    "100ms",
    "Unhealthy if the last comparison is older. Default: three times the resync and 5m.",
)


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
    loaded = load(given)
    values = {
        name: getattr(loaded.settings if name in SETTING_NAMES else loaded, name)
        for name in config.DECLARED
    }
    output.print_config(values, loaded.origins, as_json=as_json)


@command("status", *PATHS)
@AS_JSON
@click.option("--max-age", metavar=_MAX_AGE.metavar, help=_MAX_AGE.help)
def status(*, as_json: bool, max_age: str | None, **given: Any) -> int:
    """Tell how the running bridge is, and what to do if it is not well.

    Finds it by its settings, however it was started. Without any, finds the only one that runs.

    Examples:
      mbcap-watch status --json --max-age 15m
      docker exec CONTAINER mbcap-watch status
      sudo -u corescope mbcap-watch status --database /app/data/meshcore.db

    Exit codes:
      0  healthy; there may be warnings
      1  not healthy, not running, or another user's
      2  usage or configuration
    """
    from mbcap_watch.cli import views

    most = None if max_age is None else _MAX_AGE.read("--max-age", max_age)
    stats, health = _look(load(given), most)
    if as_json:
        output.print_json(views.as_json(stats, health))
    else:
        from rich.console import Console

        with output.written():
            views.render(stats, health, Console())
    return 0 if health.healthy else 1


@command("check", *PATHS, "mode", "max_bytes", "downgrade")
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

    loaded = load(given)
    findings = anyio.run(doctor.examine, loaded.settings, os.environ, loaded.file)
    code = doctor.exit_code(findings)
    if as_json:
        output.print_json({"ok": not code, "findings": msgspec.to_builtins(findings)})
    else:
        output.print_findings(findings)
    return code


@command("top", *PATHS)
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

    loaded = load(given)
    top.show(lambda: _look(loaded))


@command("plot", *PATHS)
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

    stats, health = _look(load(given))
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
    """Ask the bridge with these settings; if they name no database, else the only one there is."""
    from mbcap_watch.doctor import service

    unnamed = {loaded.origins[name] for name in PATHS} == {"default"}
    return service.look(loaded.settings, os.environ, max_age, loaded.file, anyone=unnamed)


COMMANDS: Final = (show_config, status, check, show_top, show_plot)
