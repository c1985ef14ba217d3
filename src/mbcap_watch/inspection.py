"""The commands that only look: how it is configured, how it goes, what is wrong."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import typer

from mbcap_watch import config, discover, health, options, output, status
from mbcap_watch.settings import duration


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(name="config")(show_config)
    app.command(name="status")(show_status)


def show_config(
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
    """Print the settings as they are in effect, and where each came from."""
    loaded = config.load(context.params, os.environ, context.params.get("config_file"))
    values: dict[str, Any] = dataclasses.asdict(loaded.settings)
    values |= {name: getattr(loaded, name) for name in config.CLI_ONLY}
    if json:
        fields = {
            name: {
                "value": str(value) if isinstance(value, os.PathLike | config.Address) else value,
                "origin": loaded.origins[name],
            }
            for name, value in values.items()
        }
        output.print_json(fields)
        return
    from rich.console import Console  # noqa: PLC0415 - 17 ms and 2 MB that `run` can do without
    from rich.table import Table  # noqa: PLC0415 - as above

    table = Table("setting", "value", "from")
    for name, value in values.items():
        table.add_row(name, str(value), loaded.origins[name])
    Console(soft_wrap=True).print(table)


def show_status(
    context: typer.Context,
    database: options.Database = None,
    snapshot_dir: options.SnapshotDir = None,
    config_file: options.ConfigFile = None,
    max_age: options.MaxAge = None,
    json: options.Json = False,
) -> None:
    """Tell how the running bridge is, and what to do if it is not well.

    Finds it by its settings, however it was started. Exit codes: 0 healthy; 1 not, or not running;
    2 usage or configuration. As a container's HEALTHCHECK: `mbcap-watch status --json`.
    """
    settings = config.load(context.params, os.environ, context.params.get("config_file")).settings
    most = None if max_age is None else duration("--max-age", max_age, 0.1)
    search = discover.find(settings, os.environ)
    stats = search.found[0].stats if search.found else None
    found = health.judge_search(search, settings, most)
    if json:
        output.print_json(status.as_json(stats, found))
    else:
        from rich.console import Console  # noqa: PLC0415 - as above

        status.render(stats, found, Console())
    raise typer.Exit(0 if found.healthy else 1)
