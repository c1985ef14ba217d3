"""A setting is declared once; options, variables, keys and pages are made from that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from docs import generate

import mbcap_watch
from mbcap_watch.cli import config
from mbcap_watch.errors import SettingsError
from processes import call, call_json, daemon
from support import TESTS, make_database, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from processes import Call

ROOT = TESTS.parent


# ------------------------------------------------------------------------------ one declaration


@pytest.mark.parametrize("path", generate.PAGES)
def test_the_pages_are_as_they_are_generated(path: str) -> None:
    assert (ROOT / path).read_text() == generate.PAGES[path](), "run: python docs/generate.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, before, declaration",
    [
        ("settings.py", "    batch_rows:", '    depth: Rows = Rows("7", "1", "How deep it is.")\n'),
        ("cli/config.py", "    http:", '    depth: Flag = Flag("Whether it is deep.")\n'),
    ],
)
def test_a_new_setting_is_written_in_one_place(
    tmp_path: Path, file: str, before: str, declaration: str
) -> None:
    """With one field more, it is in the help, an option, a variable, a key, and on every page."""
    package = tmp_path / "mbcap_watch"
    shutil.copytree(os.path.dirname(mbcap_watch.__file__), package)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "config").mkdir()
    source = (package / file).read_text()
    assert source.count(before) == 1
    (package / file).write_text(source.replace(before, declaration + before))
    env = {"PYTHONPATH": str(tmp_path)}

    subprocess.run(
        [sys.executable, tmp_path / "docs" / "generate.py"], env=os.environ | env, check=True
    )
    assert "\n#depth = " in (tmp_path / "config" / "mbcap-watch.toml").read_text()
    assert "\n| `depth` | " in (tmp_path / "docs" / "settings.md").read_text()
    assert r"\fB\-\-depth" in (tmp_path / "docs" / "mbcap-watch.1").read_text()
    assert "  --depth" in call("run", "--help", env=env).stdout

    toml = tmp_path / "c.toml"
    toml.write_text("depth = 'deep'\n")
    done = call("config", "--config", toml, env=env)
    assert done.returncode == 2
    assert done.stderr.startswith(f"mbcap-watch: {toml}: depth: expected ")
    for arguments, variables, origin in (
        ((), {}, "default"),
        ((), {"MBCAP_WATCH_DEPTH": "1"}, "MBCAP_WATCH_DEPTH"),
        (("--depth", *["3"] * ("Rows" in declaration)), {}, "--depth"),
    ):
        _, shown = call_json("config", *arguments, env=env | variables)
        assert shown["depth"]["origin"] == origin


# ------------------------------------------------------------------------------ bad input


# Each with what is named. TOML is the file.
BAD: list[tuple[list[str], dict[str, str], str, str]] = [
    (["apply", "--batch-rows", "0"], {}, "", "--batch-rows: expected a number from 1 to 8000"),
    (["run", "--mode", "often"], {}, "", "--mode: expected one of auto, inotify, poll"),
    (["run", "--database", ""], {}, "", "--database: expected a path"),
    (["run", "--http", "here"], {}, "", "--http: expected ADDRESS:PORT"),
    (["run", "--no-such"], {}, "", "--no-such"),
    (["apply", "--debounce", "1s"], {}, "", "--debounce"),
    (["run", "--mode"], {}, "", "--mode"),
    (["status", "--max-age", "never"], {}, "", "--max-age: expected a duration"),
    (["publish"], {}, "", "'FILE|-'"),
    (["status", "now"], {}, "", "now"),
    (["start"], {}, "", "'start'"),
    (["run"], {"MBCAP_WATCH_ACK": "perhaps"}, "", "MBCAP_WATCH_ACK: expected true or false"),
    (["run"], {"MBCAP_WATCH_MOD": "poll"}, "", "MBCAP_WATCH_MOD: unknown setting"),
    (["run"], {"DB_PATH": "a\n"}, "batch_rows = 'x'", "TOML: batch_rows: expected a number"),
    (["run"], {}, "mod = 'poll'", "TOML: mod: unknown setting"),
    (["run"], {"MBCAP_WATCH_" + "X" * 9999: "1"}, "", "XXX…: unknown setting"),
    (["run"], {}, f"{'x' * 9999} = 1", "xxx…: unknown setting"),
    (["run"], {}, "resync = 0.01", "TOML: resync: expected a duration from 100ms to 168h"),
    (["run"], {}, f"mode = '{'x' * 9999}'", "TOML: mode: expected one of auto, inotify, poll, got"),
    (["run"], {}, "ack = 1", "TOML: ack: expected true or false"),
    (["run"], {}, "mode = poll", "TOML: is not valid TOML: "),
    (["run"], {}, "mode = 'poll\n\nx'", "TOML: is not valid TOML: "),
    (["run", "--config", "/no\n/file"], {}, "", r"/no\n/file: cannot be read: No such file"),
]


@pytest.mark.parametrize("arguments, env, toml, named", BAD)
def test_bad_input_is_one_line_in_the_users_words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call_here: Call,
    arguments: list[str],
    env: dict[str, str],
    toml: str,
    named: str,
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(toml)
    for name, value in (env | ({"MBCAP_WATCH_CONFIG": str(file)} if toml else {})).items():
        monkeypatch.setenv(name, value)
    done = call_here(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("mbcap-watch: ")
    assert len(line) < 500
    assert named.replace("TOML:", f"{file}:", 1) in line


def test_no_command_is_told_of_all(call_here: Call) -> None:
    done = call_here()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == call_here("--help").stdout


# ------------------------------------------------------------------------------ the usual file


def test_the_usual_file_is_read_if_no_other_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, other = tmp_path / "usual.toml", tmp_path / "other.toml"
    monkeypatch.setattr(config, "CONFIG_FILE", usual)
    assert config.load({}, {}).file is None
    monkeypatch.setattr(config, "CONFIG_FILE", usual / "beneath a file")
    usual.write_text("mode = 'poll'\n")
    assert config.load({}, {}).file is None

    monkeypatch.setattr(config, "CONFIG_FILE", usual)
    loaded = config.load({}, {})
    assert (loaded.settings.mode, loaded.file) == ("poll", usual)
    assert loaded.origins["mode"] == f"{usual}: mode"

    other.write_text("resync = '1m'\n")
    for options, environ in (({"config": other}, {}), ({}, {"MBCAP_WATCH_CONFIG": str(other)})):
        loaded = config.load({}, environ, options.get("config"))
        assert (loaded.settings.mode, loaded.settings.resync) == ("auto", 60.0)

    usual.write_text("mode = poll\n")
    with pytest.raises(SettingsError, match="is not valid TOML"):
        config.load({}, {})
    usual.unlink()
    usual.mkdir()
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        config.load({}, {})


def test_status_finds_a_daemon_of_the_usual_file(tmp_path: Path, database: Path) -> None:
    usual = tmp_path / "usual.toml"
    usual.write_text(f"database = '{database}'\n")
    code = f"import mbcap_watch.cli.config as c; c.CONFIG_FILE = '{usual}'"
    with daemon(database):
        exit_code, told = call_json("status", code=code)
    assert (exit_code, told["state"]) == (0, "running")


# ------------------------------------------------------------------------------ several daemons


def test_status_shows_the_one_for_the_settings_else_the_only_one_else_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine whose only daemons are the test's."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    code = f"""if True:
        import pathlib, mbcap_watch.telemetry.ask as a
        a.places = lambda *_: [pathlib.Path({str(tmp_path / "mbcap-watch")!r})]
    """

    def ask(*arguments: object) -> tuple[int, str | None, str, str]:
        exit_code, said = call_json("status", *arguments, code=code)
        database = said["stats"] and said["stats"]["database"]
        return exit_code, database, said["state"], str(said["problems"] + said["warnings"])

    one, two = tmp_path / "one.db", tmp_path / "two.db"
    for each in (one, two):
        make_database(each)
    with daemon(one):
        assert ask()[:3] == (0, str(one), "running")
        # That one was asked for, and does not run.
        assert ask("--database", two)[:3] == (1, None, "not running")
        with daemon(two, "--snapshot-dir", str(tmp_path / "other")):
            *said, listed = ask()
            assert said == [1, None, "not running"]
            assert (str(one) in listed, str(two) in listed) == (True, True)
            assert ask("--database", one)[1] == str(one)
        wait_until(lambda: ask()[1] == str(one), "the only one again")
