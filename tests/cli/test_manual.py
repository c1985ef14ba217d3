"""`--help` as a manual page, and completion in real shells."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys

import pytest

from mbcap_watch.cli import output
from mbcap_watch.cli.app import app
from mbcap_watch.cli.config import DECLARED
from processes import call

pytestmark = pytest.mark.slow  # it starts the program for every page

PROGRAMS = os.path.dirname(sys.executable)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


@functools.cache
def help_of(*command: str) -> str:
    """Return the help as a pager or a file gets it."""
    done = call(*command, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def options_of(text: str) -> set[str]:
    return set(re.findall(r"^  (?:-o, )?(--[a-z-]+)", text.partition("Options:")[2], re.MULTILINE))


@pytest.mark.parametrize("command", app.commands)
def test_help_is_plain_text_of_80_columns_with_every_section(command: str) -> None:
    text = help_of(command)
    assert text.isascii()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    sections = re.findall(r"^  ([A-Z][a-z ]+):$", text, re.MULTILINE)
    assert sections[:2] == ["Examples", "Exit codes"]
    assert sections[2:] == ([] if command == "demo" else ["Environment", "Files"])
    # Lines are where they were written: nothing was wrapped.
    for line in str(app.commands[command].epilog).replace("\b\n", "").splitlines():
        assert f"  {line}".rstrip() in text.splitlines()
    # The examples use options that there are.
    options, _, rest = text.partition("  Examples:\n")
    examples = rest.partition("  Exit codes:\n")[0]
    assert f"mbcap-watch {command}" in examples
    assert set(re.findall(r" (--[a-z-]+)", examples)) <= options_of(options)


WATCHING = {"mode", "poll_interval", "sweep_interval", "resync", "debounce", "max_wait"}


@pytest.mark.parametrize(
    "command, unused",
    [
        ("run", set()),
        ("config", set()),
        ("apply", WATCHING | {"ack", "http", "downgrade_hold"}),
        ("publish", set(DECLARED) - {"database", "snapshot_dir", "max_bytes"}),
        ("status", set(DECLARED) - {"database", "snapshot_dir"}),
    ],
)
def test_a_command_takes_only_what_it_uses(command: str, unused: set[str]) -> None:
    taken = {option.removeprefix("--").replace("-", "_") for option in options_of(help_of(command))}
    assert taken & set(DECLARED) == set(DECLARED) - unused


def test_the_first_help_fits_a_screen() -> None:
    lines = help_of().splitlines()
    assert len(lines) < 24  # the prompt takes one
    assert max(map(len, lines)) <= 80
    listed = re.findall(r"^  ([a-z]+)  .*\.$", "\n".join(lines), re.MULTILINE)
    assert listed == list(app.commands)


def test_the_exit_codes_of_apply_are_those_of_the_outcomes() -> None:
    epilog = str(app.commands["apply"].epilog)
    codes = {int(code) for code in re.findall(r"^  (\d)  ", epilog, re.MULTILINE)}
    assert codes == {output.EXIT_USAGE, *output.EXIT_CODES.values()}


# The start of a shell as the help says it, and how it is asked what comes after a command line.
SHELLS = {
    "bash": """
        {line}
        COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        $(complete -p mbcap-watch | sed 's/.* -F \\([^ ]*\\) .*/\\1/') mbcap-watch
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """,
    # Its function for it only works within its line editor.
    "zsh": """
        autoload -U compinit; compinit -D
        {line}
        test $_comps[mbcap-watch] = _mbcap_watch_completion || exit
        words=({words})
        COMP_WORDS="$words" COMP_CWORD=$(($#words - 1)) _MBCAP_WATCH_COMPLETE=zsh_complete \\
            mbcap-watch | sed -n '2~3p'
    """,
    "fish": """
        {line}
        complete -C "{words}" | cut -f1
    """,
}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.skipif(shutil.which("mbcap-watch", path=PROGRAMS) is None, reason="not installed")
def test_completion_works_as_the_help_says(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    by_eval, by_source = re.findall(r"^ *(.*_MBCAP_WATCH_COMPLETE.*)$", help_of(), re.MULTILINE)
    line = by_source if shell == "fish" else by_eval.replace("bash_source", f"{shell}_source")

    def completed(*words: str) -> list[str]:
        given = " ".join(["mbcap-watch", *words, "" if shell == "fish" else "''"])
        done = subprocess.run(
            [shell, "-c", SHELLS[shell].format(line=line, words=given)],
            env=os.environ | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stderr == ""
        return done.stdout.split()

    assert sorted(completed()) == sorted(app.commands)
    assert completed("run", "--mode") == ["auto", "inotify", "poll"]
