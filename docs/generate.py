"""Write the pages that are made from the code: `python docs/generate.py`. A test compares them.

Settings are declared in `settings.Settings` and `cli.config.Config`, the commands in `cli/app.py`.
"""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from mbcap_watch.cli import config
from mbcap_watch.cli.app import app
from mbcap_watch.settings import CONFIG_FILE, DATABASE_VARIABLE, ENV_PREFIX, Location, Rows

if TYPE_CHECKING:
    from mbcap_watch.settings import Setting

ROOT: Final = Path(__file__).resolve().parent.parent


def toml() -> str:
    """Return `config/mbcap-watch.toml`."""
    parts = [
        f"""\
# mbcap-watch: every setting, with its default. Remove the "#" in front of what you change.
#
# {CONFIG_FILE} is read if no other file is named. An option on the command
# line beats the environment ({ENV_PREFIX}POLL_INTERVAL=2s), the environment beats this file.
# Durations: "250ms", "5s", "10m", "1h", or a number of seconds. Sizes: "64MiB", or bytes.
"""
    ]
    for name, setting in config.DECLARED.items():
        text = f"{setting.help} ({setting.accepts})"
        comment = textwrap.fill(text, 98, initial_indent="# ", subsequent_indent="# ")
        parts.append(f"{comment}\n#{name} = {_literal(name, setting)}\n")
    return "\n".join(parts)


def _literal(name: str, setting: Setting[Any, Any]) -> str:
    """Return the default as TOML writes it; JSON writes these the same."""
    if isinstance(setting, Location):
        return json.dumps(os.path.relpath(getattr(config.load({}, {}, os.devnull).settings, name)))
    return str(setting.default) if isinstance(setting, Rows) else json.dumps(setting.default)


def table() -> str:
    """Return `docs/settings.md`."""
    lines = [
        f"""\
# Settings

Each setting is an option, an environment variable, and a key of the TOML file:
`--poll-interval 2s`, `{ENV_PREFIX}POLL_INTERVAL=2s`, `poll_interval = "2s"`. An option beats the
environment, the environment beats the file, the file beats the default. An empty variable counts as
not set. An unknown name or a bad value ends the command with exit code 2 and one line that names
the option, the variable, or the file and the key.

The file is that of `--config FILE` or `{ENV_PREFIX}CONFIG`; if neither is given,
`{CONFIG_FILE}`, if it is there.
[config/mbcap-watch.toml](../config/mbcap-watch.toml) holds every setting with its default.
`{DATABASE_VARIABLE}`, CoreScope's own variable, names the database unless
`{ENV_PREFIX}DATABASE` does.

`mbcap-watch config` prints the settings in effect, and where each came from. A command has options
for the settings that it uses. A program gives those before `{config.CLI_ONLY[0]}` to `Settings`.

A duration is `250ms`, `5s`, `10m`, `1h`, or a number of seconds. A size is `64KiB`, `64MiB`,
`1GiB`, or a number of bytes.

| setting | default | values | what it is for |
|---|---|---|---|
"""
    ]
    for name, setting in config.DECLARED.items():
        default = setting.usual if isinstance(setting, Location) else _literal(name, setting)
        shown = default.strip('"')
        cells = f"`{shown}`" if shown else "none", setting.accepts, setting.help
        lines.append(f"| `{name}` | {' | '.join(cells)} |\n")
    return "".join(lines)


def manual() -> str:
    """Return `docs/mbcap-watch.1`, from the help of every command."""
    lines = ['.TH MBCAP-WATCH 1 "" mbcap-watch', ".SH NAME"]
    lines += [_roff(f"mbcap-watch - {str(app.help).rstrip('.')}")]
    lines += [".SH SYNOPSIS", "mbcap\\-watch COMMAND [OPTIONS]", ".SH COMMANDS"]
    shared: dict[str, str] = {}
    for name, command in app.commands.items():
        options = [each for each in command.params if isinstance(each, click.Option)]
        arguments = [str(each.metavar) for each in command.params if each not in options]
        lines.append(f'.SS "{_roff(" ".join(["mbcap-watch", name, *arguments]))}"')
        for paragraph in str(command.help).strip().split("\n\n"):
            lines += [_roff(paragraph), ".PP"]
        for option in options:
            names = f"{', '.join(option.opts)} {option.metavar or ''}".strip()
            lines += [".TP", rf"\fB{_roff(names)}\fR", _roff(str(option.help))]
        for section in str(command.epilog).replace("\b\n", "").split("\n\n"):
            title, _, body = section.partition(":\n")
            if title in ("Environment", "Files"):
                shared[title] = body
            else:
                lines += [".PP", f"{title}:", ".nf", _roff(body), ".fi"]
    for title, body in shared.items():
        lines += [f".SH {title.upper()}", ".nf", _roff(textwrap.dedent(body)), ".fi"]
    return "\n".join(lines) + "\n"


def _roff(text: str) -> str:
    """Return text as it is: neither a control line nor an escape nor another hyphen."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(
        f"\\&{line}" if line[:1] in (".", "'") else line for line in escaped.split("\n")
    )


PAGES: Final = {
    "config/mbcap-watch.toml": toml,
    "docs/settings.md": table,
    "docs/mbcap-watch.1": manual,
}

if __name__ == "__main__":
    for path, page in PAGES.items():
        (ROOT / path).write_text(page(), encoding="utf-8")
