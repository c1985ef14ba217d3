"""What the bridge can be told, and what it refuses to be told."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mbcap_watch.errors import SettingsError
from mbcap_watch.settings import SETTING_NAMES, Settings


def test_defaults() -> None:
    assert dataclasses.asdict(Settings(Path("/data/meshcore.db"))) == {
        "database": Path("/data/meshcore.db"),
        "snapshot_dir": Path("/data/mbcap-snapshot"),
        "mode": "auto",
        "poll_interval": 1.0,
        "sweep_interval": 5.0,
        "resync": 300.0,
        "debounce": 0.1,
        "max_wait": 1.0,
        "batch_rows": 500,
        "busy_deadline": 30.0,
        "wal_grace": 60.0,
        "max_bytes": 12_582_912,
        "downgrade": "allow",
        "downgrade_hold": 600.0,
    }


def make(**values: Any) -> Settings:
    """Make settings from loosely typed values."""
    return Settings.from_mapping({"database": "/data/meshcore.db"} | values)


@pytest.mark.parametrize(
    "given, seconds",
    [
        (2, 2.0),
        (0.25, 0.25),
        ("2", 2.0),
        ("250ms", 0.25),
        ("250 ms", 0.25),
        ("5s", 5.0),
        (" 5s ", 5.0),
        ("1.5m", 90.0),
        ("2h", 7200.0),
        ("168h", 604_800.0),
    ],
)
def test_durations(given: float | str, seconds: float) -> None:
    value = make(resync=given).resync
    assert value == pytest.approx(seconds)
    assert type(value) is float


@pytest.mark.parametrize(
    "given, size",
    [
        (1, 1),
        (1e6, 1_000_000),
        ("4096", 4096),
        ("4096B", 4096),
        ("1.5KiB", 1536),
        ("64MiB", 64 << 20),
        ("64 MiB", 64 << 20),
        ("10GiB", 10 << 30),
    ],
)
def test_sizes(given: float | str, size: int) -> None:
    value = make(max_bytes=given).max_bytes
    assert value == size
    assert type(value) is int


@pytest.mark.parametrize(
    "values, setting",
    [
        ({"poll_interval": "10ms"}, 0.01),
        ({"sweep_interval": 0.01}, 0.01),
        ({"resync": 0.1}, 0.1),
        ({"debounce": 0, "max_wait": 0}, 0.0),
        ({"busy_deadline": 0}, 0.0),
        ({"batch_rows": 1}, 1),
        ({"batch_rows": 8_000}, 8_000),
        ({"batch_rows": "250"}, 250),
        ({"mode": "inotify"}, "inotify"),
        ({"mode": "poll"}, "poll"),
        ({"downgrade": "never"}, "never"),
    ],
)
def test_the_ends_of_what_is_allowed(values: dict[str, Any], setting: object) -> None:
    assert getattr(make(**values), next(iter(values))) == setting


DURATIONS = ("poll_interval", "sweep_interval", "resync", "debounce", "max_wait", "busy_deadline")
NO_NUMBER: list[object] = [None, True, [], b"1", math.nan, math.inf, -math.inf, 10**400]
NO_TEXT: list[object] = [
    *("", "five", "5 5", "-1", "+1", "1e3", ".5", "5.", "5  s", "0x10", "1_000", "\u0665")
]
NO_CHOICE: list[object] = ["", "Auto", "auto ", None, 1, True, []]
NO_PATH: list[object] = ["", None, 5, b"x", []]
BAD: list[tuple[str, object]] = [
    *(("resync", value) for value in [*NO_NUMBER, *NO_TEXT, -1, "5S", "5 sec", "5KiB", "1d"]),
    *((name, value) for name in DURATIONS for value in [None, "five", -1, "169h"]),
    *((name, 0) for name in ("poll_interval", "sweep_interval", "resync")),
    ("poll_interval", "9ms"),
    ("sweep_interval", 0.0099),
    ("resync", 0.05),
    *(("batch_rows", value) for value in [*NO_NUMBER, *NO_TEXT, 0, -1, 10_001, 1.5, "1s", "1KiB"]),
    *(("max_bytes", value) for value in [*NO_NUMBER, *NO_TEXT, 0, -1, 1.5, "1kb", "1MB", "0.1KiB"]),
    *((name, value) for name in ("mode", "downgrade") for value in NO_CHOICE),
    ("mode", "allow"),
    ("downgrade", "auto"),
    *(("database", value) for value in NO_PATH),
    *(("snapshot_dir", value) for value in NO_PATH if value is not None),
    ("database", "a\0b"),
    ("snapshot_dir", "a\0b"),
    ("database", "a\ud800b"),
    ("snapshot_dir", "a\ud800b"),
]


@pytest.mark.parametrize("name, value", BAD)
def test_a_bad_value_names_its_setting(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: .") as caught:
        make(**{name: value})
    assert caught.value.setting == name
    assert caught.value.problem


@pytest.mark.parametrize("name", ["databse", "Mode", "poll-interval", "log_level", ""])
def test_an_unknown_name_is_told_with_those_that_are_known(name: str) -> None:
    known = r"unknown setting; known: database, .*downgrade_hold$"
    with pytest.raises(SettingsError, match=known) as e:
        make(**{name: 1})
    assert e.value.setting == name


def test_of_a_long_unknown_name_the_start_is_told() -> None:
    with pytest.raises(SettingsError) as e:
        make(**{"x" * 9999: 1})
    assert e.value.setting.startswith("xxx")
    assert len(str(e.value)) < 500


def test_the_database_is_needed() -> None:
    with pytest.raises(SettingsError, match=r"^database: is not set"):
        Settings.from_mapping({"mode": "poll"})


@pytest.mark.parametrize("name", SETTING_NAMES)
def test_frozen(name: str) -> None:
    settings = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, name, getattr(settings, name))


def test_equal_and_hashable() -> None:
    assert {make(poll_interval="2s"), make(poll_interval=2)} == {make(poll_interval=2.0)}


def test_a_later_chdir_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_mapping({"database": "data/meshcore.db", "snapshot_dir": "../nfs"})
    beside = Settings(Path("meshcore.db"))
    monkeypatch.chdir("/")
    assert settings.database == tmp_path / "data" / "meshcore.db"
    assert settings.snapshot_dir == tmp_path.parent / "nfs"
    assert beside.snapshot_dir == tmp_path / "mbcap-snapshot"


def test_a_tilde_is_the_shells_business() -> None:
    # The publishing half does not expand it either: both must mean the same directory.
    assert make(database="~/meshcore.db").database == Path.cwd() / "~" / "meshcore.db"


def test_a_path_that_file_names_here_cannot_have_says_so() -> None:
    script = "from mbcap_watch import Settings; Settings('/\\xe9.db')"
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.endswith(r"SettingsError: database: '/\xe9.db' is no file name in ascii")


def test_a_path_that_is_no_text_is_shown_safely() -> None:
    with pytest.raises(SettingsError) as caught:
        make(database="\ud800" + "x" * 9999)
    assert caught.value.problem.isprintable()
    assert len(caught.value.problem) < 200


def test_a_directory_that_is_called_like_the_default_is_no_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("mbcap-snapshot", Path("mbcap-snapshot")):
        assert make(snapshot_dir=given).snapshot_dir == tmp_path / "mbcap-snapshot"


def test_links_stay_as_they_are_given(tmp_path: Path) -> None:
    # A snapshot directory that is swapped by its link has to be followed at every look.
    (tmp_path / "link").symlink_to("real")
    assert make(snapshot_dir=tmp_path / "link").snapshot_dir == tmp_path / "link"


def test_a_path_of_any_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.db")
    assert make(database=tmp_path / name).database == tmp_path / name
