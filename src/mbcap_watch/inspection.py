"""The commands that only look: how it is configured, how it goes, what is wrong."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from mbcap_watch import config, options, output


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(name="config")(show_config)


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
) -> None:
    """Print the settings as they are in effect, and where each came from."""
    loaded = config.load(context.params, os.environ, context.params.get("config_file"))
    values: dict[str, Any] = dataclasses.asdict(loaded.settings)
    values |= {name: getattr(loaded, name) for name in config.CLI_ONLY}
    if json:
        fields = {
            name: {
                "value": str(value) if isinstance(value, os.PathLike) else value,
                "origin": loaded.origins[name],
            }
            for name, value in values.items()
        }
        output.print_json(fields)
        return
    table = Table("setting", "value", "from")
    for name, value in values.items():
        table.add_row(name, str(value), loaded.origins[name])
    Console(soft_wrap=True).print(table)
