"""The commands that only read: the configuration, how a daemon does, what is wrong."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import anyio
import msgspec
import typer

from mbcap_watch.cli import config, manual, options, output, views
from mbcap_watch.doctor import service
from mbcap_watch.settings import duration


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(name="config", epilog=manual.CONFIG)(show_config)
    app.command(name="status", epilog=manual.STATUS)(show_status)
    app.command(name="check", epilog=manual.CHECK)(check)
    app.command(name="top", epilog=manual.TOP)(show_top)
    app.command(name="plot", epilog=manual.PLOT)(show_plot)


@options.takes(options.PATHS, options.JSON, options.LOG, options.SETTINGS, options.DAEMON)
def show_config(context: typer.Context, **_: Any) -> None:
    """Print the settings in effect, and where each came from."""
    loaded = config.load(context.params, os.environ, context.params.get("config_file"))
    values: dict[str, Any] = dataclasses.asdict(loaded.settings)
    values |= {name: getattr(loaded, name) for name in config.CLI_ONLY}
    if context.params["json"]:
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

    table, console = Table("setting", "value", "from"), Console(soft_wrap=True)
    for name, value in values.items():
        origin = views.plain(loaded.origins[name], console)
        table.add_row(name, views.plain(str(value), console), origin)
    console.print(table)


@options.takes(options.PATHS, options.MAX_AGE, options.JSON)
def show_status(context: typer.Context, **_: Any) -> None:
    """Tell how the running bridge is, and what to do if it is not well.

    Finds it by its settings, however it was started. Fit for a container's HEALTHCHECK.
    """
    loaded = config.load(context.params, os.environ, context.params.get("config_file"))
    max_age = context.params["max_age"]
    most = None if max_age is None else duration("--max-age", max_age, 0.1)
    stats, found = service.look(loaded.settings, os.environ, most, loaded.file)
    if context.params["json"]:
        output.print_json(views.as_json(stats, found))
    else:
        from rich.console import Console  # noqa: PLC0415 - as above

        try:
            views.render(stats, found, Console())
        except OSError as exc:  # its disk is full, say, which is when this command is needed
            raise output.OutputError(f"standard output cannot be written: {exc}") from exc
    raise typer.Exit(0 if found.healthy else 1)


@options.takes(
    options.PATHS,
    options.JSON,
    {name: options.SETTINGS[name] for name in ("mode", "max_bytes", "downgrade")},
)
def check(context: typer.Context, **_: Any) -> None:
    """Examine the installation; say what is wrong and what to do.

    Changes nothing.
    Run it as the user that runs the service.
    """
    from mbcap_watch.doctor import check as doctor  # noqa: PLC0415 - `run` can do without

    loaded = config.load(context.params, os.environ, context.params.get("config_file"))
    findings = anyio.run(doctor.examine, loaded.settings, os.environ, loaded.file)
    code = doctor.exit_code(findings)
    if context.params["json"]:
        output.print_json({"ok": not code, "findings": msgspec.to_builtins(findings)})
    else:
        output.print_findings(findings)
    raise typer.Exit(code)


@options.takes(options.PATHS)
def show_top(context: typer.Context, **_: Any) -> None:
    """Show live how the running bridge is.

    q or Ctrl-C quits. When nothing runs, it says so and goes on asking. Without a terminal on
    standard input and output, it prints what there is once.
    """
    from mbcap_watch.cli import top  # noqa: PLC0415 - rich, as above

    loaded = config.load(context.params, os.environ, context.params.get("config_file"))
    top.show(lambda: service.look(loaded.settings, os.environ, config=loaded.file))


@options.takes(options.PATHS, options.OUT)
def show_plot(context: typer.Context, **_: Any) -> None:
    """Draw lag and lock holds of the latest results, as an SVG."""
    from mbcap_watch.cli import plot  # noqa: PLC0415 - its html is 0.3 MB that `run` can do without

    settings = config.load(context.params, os.environ, context.params.get("config_file")).settings
    stats, found = service.look(settings, os.environ)
    if stats is None:
        output.fail((found.problems or found.warnings)[0].text, 1)
    drawing, out = plot.svg(stats), context.params["out"]
    if out is None:
        for line in drawing.splitlines():
            output.print_line(line)
        return
    try:
        Path(out).write_text(drawing, encoding="utf-8")
    except OSError as exc:
        output.fail(f"{out}: cannot be written: {exc.strerror}", 1)
