"""How a command is made: its options from the declared settings, its help from its docstring."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import CompletionItem

from mbcap_watch.cli import config
from mbcap_watch.settings import CONFIG_FILE, Choice, Location

if TYPE_CHECKING:
    from collections.abc import Callable

    from mbcap_watch.settings import Setting

# Below the options of every command that takes settings.
_SHARED: Final = f"""

Environment:
  DB_PATH             the database, CoreScope's own variable
  MBCAP_WATCH_CONFIG  a TOML file, as --config
  MBCAP_WATCH_...     every other setting: MBCAP_WATCH_POLL_INTERVAL=2s
  An option beats the environment, the environment beats the file; there
  the same names are keys: poll_interval = "2s".
  Durations are 250ms, 5s, 10m, 1h; sizes are 64KiB, 64MiB, 1GiB.

Files:
  {CONFIG_FILE}  read if no other is named
  mbcap-snapshot/snapshot.json       the snapshot, replaced by rename
  mbcap-snapshot/result.json         the answer to the publisher, with --ack
"""


def option(name: str, setting: Setting[Any, Any]) -> click.Option:
    """Return the option for a setting. It checks nothing: `config.load` names a bad source."""
    names = [config.option_name(name)]
    if isinstance(setting, config.Flag):
        return click.Option(names, flag_value=True, default=None, help=setting.help)
    usual = setting.usual if isinstance(setting, Location) else setting.default
    text = f"{setting.help} Default: {usual}." if usual else setting.help

    def complete(_: click.Context, __: click.Parameter, start: str) -> list[CompletionItem]:
        if isinstance(setting, Choice):
            return [CompletionItem(each) for each in setting.choices if each.startswith(start)]
        kind = {"FILE": "file", "DIR": "dir"}.get(setting.metavar)
        return [CompletionItem(start, type=kind)] if kind else []

    return click.Option(names, metavar=setting.metavar, help=text, shell_complete=complete)


PATHS: Final = ("database", "snapshot_dir")
_CONFIG: Final = Location("FILE", "A TOML file with settings.", usual=str(CONFIG_FILE))
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object per result.")


def command(
    name: str, *settings: str, configured: bool = True
) -> Callable[[Callable[..., int | None]], click.Command]:
    """Make a command of a function, with options for `settings`; its docstring is the help.

    All from "Examples:" on stands below the options, as it is written. `configured`: settings may
    come from the environment and a file, too.
    """

    def make(function: Callable[..., int | None]) -> click.Command:
        text, title, below = inspect.cleandoc(function.__doc__ or "").partition("Examples:")
        sections = f"{title}{below}{_SHARED if configured else ''}".strip().split("\n\n")
        options = [option(each, config.DECLARED[each]) for each in settings]
        if configured:
            options.append(option("config", _CONFIG))
        return click.command(
            name,
            help=text,
            epilog="\n\n".join(f"\b\n{section}" for section in sections),
            params=options,
        )(function)

    return make


def load(given: dict[str, Any]) -> config.Config:
    """Merge the options that a command was given with all other sources."""
    return config.load(given, os.environ, given["config"])
