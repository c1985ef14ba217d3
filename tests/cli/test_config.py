"""Where a setting comes from: option, environment, file, default; and who is blamed for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mbcap_watch.cli.config import CLI_ONLY, load
from mbcap_watch.errors import SettingsError
from mbcap_watch.settings import SETTING_NAMES

# For every name: three values apart from the default, each as text, and what they come to.
VALUES: dict[str, list[tuple[str, object]]] = {
    "database": [(f"/{name}.db", Path(f"/{name}.db")) for name in ("file", "environ", "option")],
    "snapshot_dir": [(f"/{name}", Path(f"/{name}")) for name in ("file", "environ", "option")],
    "mode": [("poll", "poll"), ("inotify", "inotify"), ("poll", "poll")],
    "poll_interval": [("2s", 2.0), ("3s", 3.0), ("4s", 4.0)],
    "sweep_interval": [("2s", 2.0), ("3s", 3.0), ("4s", 4.0)],
    "resync": [("2m", 120.0), ("3m", 180.0), ("4m", 240.0)],
    "debounce": [("0.25s", 0.25), ("0.5s", 0.5), ("0.75s", 0.75)],
    "max_wait": [("2s", 2.0), ("3s", 3.0), ("4s", 4.0)],
    "batch_rows": [("2", 2), ("3", 3), ("4", 4)],
    "busy_deadline": [("2s", 2.0), ("3s", 3.0), ("4s", 4.0)],
    "wal_grace": [("2s", 2.0), ("3s", 3.0), ("4s", 4.0)],
    "max_bytes": [("2KiB", 2048), ("3KiB", 3072), ("4KiB", 4096)],
    "downgrade": [("never", "never"), ("allow", "allow"), ("never", "never")],
    "downgrade_hold": [("2m", 120.0), ("3m", 180.0), ("4m", 240.0)],
    "log_level": [("debug", "debug"), ("warning", "warning"), ("error", "error")],
    "log_format": [("json", "json"), ("text", "text"), ("json", "json")],
    "http": [
        ("localhost:0", ("localhost", 0)),
        ("[::1]:9464", ("::1", 9464)),
        ("127.0.0.1:65535", ("127.0.0.1", 65535)),
    ],
    "ack": [("true", True), ("no", False), ("1", True)],
}


def test_every_setting_is_covered_here() -> None:
    assert set(VALUES) == {*SETTING_NAMES, *CLI_ONLY}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mbcap-watch.toml"


def value_of(name: str, options: dict[str, Any], environ: dict[str, str], file: Path | None) -> Any:
    """Load, and return what became of one name, and where from."""
    config = load(options, environ, file)
    value = getattr(config if name in CLI_ONLY else config.settings, name)
    return value, config.origins[name]


def variable_of(name: str) -> str:
    """Name the environment variable of a setting."""
    return "MBCAP_WATCH_" + name.upper()


@pytest.mark.parametrize("name", VALUES)
def test_option_before_environment_before_file_before_default(name: str, file: Path) -> None:
    in_file, in_environ, in_option = VALUES[name]
    file.write_text(f'{name} = "{in_file[0]}"\n')
    environ = {variable_of(name): in_environ[0], "PATH": "/bin"}
    option = "--" + name.replace("_", "-")

    default, origin = value_of(name, {}, {}, None)
    assert origin == "default"
    assert default not in (in_file[1], in_option[1])

    assert value_of(name, {}, {}, file) == (in_file[1], f"{file}: {name}")
    assert value_of(name, {}, environ, file) == (in_environ[1], variable_of(name))
    assert value_of(name, {name: in_option[0]}, environ, file) == (in_option[1], option)
    # An option that was not given and a variable that is empty do not count.
    assert value_of(name, {name: None}, environ, file) == (in_environ[1], variable_of(name))
    assert value_of(name, {}, {variable_of(name): ""}, file)[0] == in_file[1]


@pytest.mark.parametrize("name", VALUES)
def test_a_bad_value_is_blamed_on_the_option_the_variable_or_the_key(name: str, file: Path) -> None:
    bad = "\0" if name in ("database", "snapshot_dir") else "?"
    file.write_text(f"{name} = []\n")
    variable, option = variable_of(name), "--" + name.replace("_", "-")
    for options, environ, config_file, blamed in (
        ({}, {}, file, f"{file}: {name}"),
        ({}, {variable: bad}, file, variable),
        ({name: bad}, {variable: "x"}, file, option),
    ):
        with pytest.raises(SettingsError) as caught:
            load(options, environ, config_file)
        assert caught.value.setting == blamed
        assert str(caught.value).startswith(f"{blamed}: ")


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load({}, {})
    assert config.settings.database == tmp_path / "data" / "meshcore.db"  # as CoreScope has it
    assert config.settings.snapshot_dir == tmp_path / "data" / "mbcap-snapshot"
    assert (config.log_level, config.log_format) == ("info", "text")
    assert set(config.origins) == set(VALUES)
    assert set(config.origins.values()) == {"default"}


def test_values_of_the_file_may_be_numbers(file: Path) -> None:
    file.write_text("poll_interval = 2\nresync = 90.5\nmax_bytes = 1_048_576\nbatch_rows = 50\n")
    settings = load({}, {}, file).settings
    assert (settings.poll_interval, settings.resync) == (2.0, 90.5)
    assert (settings.max_bytes, settings.batch_rows) == (1 << 20, 50)


# ------------------------------------------------------------------------------ the environment


@pytest.mark.parametrize(
    "options, environ, database, origin",
    [
        ({}, {"DB_PATH": "/a"}, "/a", "DB_PATH"),
        ({}, {"DB_PATH": "/a", "MBCAP_WATCH_DATABASE": "/b"}, "/b", "MBCAP_WATCH_DATABASE"),
        ({}, {"MBCAP_WATCH_DATABASE": "/b", "DB_PATH": "/a"}, "/b", "MBCAP_WATCH_DATABASE"),
        ({}, {"DB_PATH": "/a", "MBCAP_WATCH_DATABASE": ""}, "/a", "DB_PATH"),
        ({"database": "/c"}, {"DB_PATH": "/a"}, "/c", "--database"),
    ],
)
def test_the_variable_of_corescope(
    options: dict[str, str], environ: dict[str, str], database: str, origin: str
) -> None:
    config = load(options, environ)
    assert str(config.settings.database) == database
    assert config.origins["database"] == origin


def test_the_variable_of_corescope_goes_before_the_file(file: Path) -> None:
    file.write_text('database = "/file.db"\n')
    assert load({}, {"DB_PATH": ""}, file).settings.database == Path("/file.db")
    assert load({}, {"DB_PATH": "/a.db"}, file).settings.database == Path("/a.db")


def test_empty_variables_do_not_count() -> None:
    environ = {variable_of(name): "" for name in (*VALUES, "nonsense", "config")} | {"DB_PATH": ""}
    assert load({}, environ) == load({}, {})


@pytest.mark.parametrize("variable", ["MBCAP_WATCH_INTERVAL", "MBCAP_WATCH_", "MBCAP_WATCH_PORTAL"])
def test_an_unknown_variable_is_named(variable: str) -> None:
    with pytest.raises(SettingsError, match="unknown setting; known: database, ") as caught:
        load({}, {variable: "1"})
    assert caught.value.setting == variable


def test_variables_of_others_are_none_of_our_business() -> None:
    environ = {
        "MBCAP": "1",
        "MBCAPWATCH_MODE": "?",
        "XMBCAP_WATCH_MODE": "?",
        "mbcap_watch_mode": "?",
    }
    assert load({}, environ) == load({}, {})


def test_variables_of_a_kubernetes_service_are_ignored() -> None:
    # As the kubelet sets them for a service "mbcap-watch" with the port 8080 named "http".
    address = "10.0.0.11"
    environ = {
        "MBCAP_WATCH_SERVICE_HOST": address,
        "MBCAP_WATCH_SERVICE_PORT": "8080",
        "MBCAP_WATCH_SERVICE_PORT_HTTP": "8080",
        "MBCAP_WATCH_PORT": f"tcp://{address}:8080",
        "MBCAP_WATCH_PORT_8080_TCP": f"tcp://{address}:8080",
        "MBCAP_WATCH_PORT_8080_TCP_PROTO": "tcp",
        "MBCAP_WATCH_PORT_8080_TCP_PORT": "8080",
        "MBCAP_WATCH_PORT_8080_TCP_ADDR": address,
    }
    assert load({}, environ) == load({}, {})


# ------------------------------------------------------------------------------ the file


def test_the_environment_may_name_the_file(file: Path, tmp_path: Path) -> None:
    file.write_text('mode = "poll"\n')
    environ = {"MBCAP_WATCH_CONFIG": str(file)}
    assert load({}, environ).settings.mode == "poll"
    other = tmp_path / "other.toml"
    other.write_text('mode = "inotify"\n')
    assert load({}, environ, other).settings.mode == "inotify"


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"mode = poll", "is not valid TOML"),
        (b'mode = "poll"\nmode = "poll"', "is not valid TOML"),
        (b'mode = "p', "is not valid TOML"),
        (b'mode = "\xff"', "is not valid TOML"),
        (b"\xef\xbb\xbfmode = 'poll'", "is not valid TOML"),
        (b"mode = " + b"[" * 5000, "is not valid TOML"),
        (b"batch_rows = " + b"9" * 5000, "is not valid TOML"),
    ],
)
def test_a_broken_file_is_named(file: Path, content: bytes, problem: str) -> None:
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=problem) as caught:
        load({}, {}, file)
    assert caught.value.setting == str(file)


def test_a_missing_file_is_named_wherever_its_name_came_from(file: Path) -> None:
    for environ, config_file in (({}, file), ({"MBCAP_WATCH_CONFIG": str(file)}, None)):
        with pytest.raises(SettingsError, match="cannot be read: No such file") as caught:
            load({}, environ, config_file)
        assert caught.value.setting == str(file)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        load({}, {}, tmp_path)


@pytest.mark.parametrize("key", ["pol_interval", "Mode", "config", "watch"])
def test_an_unknown_key_is_named_with_its_file(file: Path, key: str) -> None:
    file.write_text(f"{key} = 1\n")
    with pytest.raises(SettingsError, match="unknown setting; known: database, ") as caught:
        load({}, {}, file)
    assert caught.value.setting == f"{file}: {key}"


def test_a_table_is_an_unknown_key(file: Path) -> None:
    file.write_text('[mbcap-watch]\nmode = "poll"\n')
    with pytest.raises(SettingsError, match="mbcap-watch: unknown setting"):
        load({}, {}, file)


def test_a_bad_value_that_is_overridden_does_no_harm(file: Path) -> None:
    file.write_text('mode = "?"\nlog_level = "?"\n')
    environ = {"MBCAP_WATCH_MODE": "poll"}
    assert load({"log_level": "debug"}, environ, file).settings.mode == "poll"
