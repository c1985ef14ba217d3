"""`--help` as a manual page, and completion in a real shell."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mbcap_watch.cli import manual, output

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow  # it starts the program for every page

COMMANDS = {
    "run": manual.RUN,
    "apply": manual.APPLY,
    "publish": manual.PUBLISH,
    "demo": manual.DEMO,
    "config": manual.CONFIG,
    "status": manual.STATUS,
    "check": manual.CHECK,
    "top": manual.TOP,
    "plot": manual.PLOT,
}
PROGRAMS = os.path.dirname(sys.executable)


def help_of(*command: str) -> str:
    """Return the help as a pager or a file gets it."""
    environ = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(
        [sys.executable, "-m", "mbcap_watch", *command, "--help"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        text=True,
        env=environ,
    ).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_plain_text_of_80_columns_with_every_section(command: str) -> None:
    text = help_of(command)
    assert text.isascii()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    sections = re.findall(r"^  ([A-Z][a-z ]+):$", text, re.MULTILINE)
    assert sections[:2] == ["Examples", "Exit codes"]
    assert sections[2:] == ([] if command == "demo" else ["Environment", "Files"])
    # Lines are where they were written: nothing was wrapped.
    for line in COMMANDS[command].replace("\b\n", "").splitlines():
        assert f"  {line}".rstrip() in text.splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_use_options_that_there_are(command: str) -> None:
    options, _, rest = help_of(command).partition("  Examples:\n")
    examples = rest.partition("  Exit codes:\n")[0]
    assert f"mbcap-watch {command}" in examples
    used = set(re.findall(r" (--[a-z-]+)", examples))
    assert used <= set(re.findall(r"^  (--[a-z-]+)", options, re.MULTILINE))


def test_the_commands_are_listed_in_one_line_each() -> None:
    text = help_of()
    listed = re.findall(r"^  ([a-z]+)  .*\.$", text.partition("Commands:")[2], re.MULTILINE)
    assert set(COMMANDS) <= set(listed)
    assert max(map(len, text.splitlines())) <= 80


def test_the_exit_codes_of_apply_are_those_of_the_outcomes() -> None:
    codes = {int(code) for code in re.findall(r"^  (\d)  ", manual.APPLY, re.MULTILINE)}
    assert codes == {output.EXIT_USAGE, *output.EXIT_CODES.values()}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.skipif(shutil.which("mbcap-watch", path=PROGRAMS) is None, reason="not installed")
def test_completion_can_be_installed_and_works_in_a_new_bash(tmp_path: Path) -> None:
    environ = os.environ | {"HOME": str(tmp_path), "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}

    def bash(*arguments: str) -> str:
        return subprocess.run(
            ["bash", *arguments],
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
        ).stdout

    # "; true": else bash becomes the program, and there is no shell to be found around it.
    assert "installed" in bash("-c", "mbcap-watch --install-completion; true")

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        script = (
            f"COMP_WORDS=(mbcap-watch {line}); COMP_CWORD={len(words)};"
            "$(complete -p mbcap-watch | sed 's/.* -F \\([^ ]*\\) .*/\\1/') mbcap-watch;"
            "printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        return bash("-ic", script).split()

    assert set(completed("")) >= set(COMMANDS)
    assert completed("run", "--sweep") == ["--sweep-interval"]
    assert completed("run", "--mode", "") == ["auto", "inotify", "poll"]
