"""Where a setting comes from: an option, the environment, a TOML file, or its default."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mbcap_watch.errors import SettingsError
from mbcap_watch.settings import (
    CONFIG_VARIABLE,
    DATABASE_VARIABLE,
    DEFAULT_DATABASE,
    ENV_PREFIX,
    SETTING_NAMES,
    Settings,
    choice,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

LOG_LEVELS: Final = ("debug", "info", "warning", "error")
LOG_FORMATS: Final = ("text", "json")

# Settings of the command line alone.
_CLI_DEFAULTS: Final = {
    "log_level": "info",
    "log_format": "text",
    "ack": False,
    "http": "",
}
CLI_ONLY: Final = tuple(_CLI_DEFAULTS)
_NAMES: Final = (*SETTING_NAMES, *CLI_ONLY)

# Kubernetes puts such variables into every container when a service is called "mbcap-watch".
_KUBERNETES = re.compile(r"(SERVICE_(HOST|PORT\w*)|PORT(_\w+)?)")


class Address(NamedTuple):
    """Where to listen; as text, an IPv6 address is in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings, and where each came from.

    Attributes:
        settings: for the library.
        log_level: one of `LOG_LEVELS`.
        log_format: one of `LOG_FORMATS`.
        ack: whether `run` answers the publisher with a `result.json`.
        http: where `run` serves its figures: an address and a port; None: nowhere.
        origins: for every name, where its value came from.
        file: the TOML file that was read; None if there is none.

    """

    settings: Settings
    log_level: str
    log_format: str
    ack: bool
    http: Address | None
    origins: Mapping[str, str]
    file: Path | None = None


def load(
    options: Mapping[str, Any], environ: Mapping[str, str], config_file: str | Path | None = None
) -> Config:
    """Merge all sources: option before environment before file before default.

    Args:
        options: values by setting name; None where the option was not given.
        environ: the environment. An empty variable counts as not set.
        config_file: a TOML file; else the one that `MBCAP_WATCH_CONFIG` names, if any.

    Raises:
        SettingsError: an unknown name or a bad value; names the option, the variable, or the
            file and the key.

    """
    values: dict[str, Any] = {"database": DEFAULT_DATABASE, **_CLI_DEFAULTS}
    origins = dict.fromkeys(_NAMES, "default")

    def take(name: str, value: Any, origin: str) -> None:
        values[name] = value
        origins[name] = origin

    path = config_file or environ.get(CONFIG_VARIABLE)
    file = Path(path) if path else None
    for name, value in (_read_toml(file) if file else {}).items():
        take(name, value, f"{path}: {name}")
    if environ.get(DATABASE_VARIABLE):
        take("database", environ[DATABASE_VARIABLE], DATABASE_VARIABLE)
    for variable, name in _variables(environ).items():
        take(name, environ[variable], variable)
    for name in _NAMES:
        if options.get(name) is not None:
            take(name, options[name], "--" + name.replace("_", "-"))

    ours = {name: values.pop(name) for name in _CLI_DEFAULTS}
    try:
        return Config(
            settings=Settings.from_mapping(values),
            log_level=choice("log_level", ours["log_level"], LOG_LEVELS),
            log_format=choice("log_format", ours["log_format"], LOG_FORMATS),
            ack=_flag("ack", ours["ack"]),
            http=_address("http", ours["http"]),
            origins=origins,
            file=file,
        )
    except SettingsError as exc:
        raise in_users_words(exc, origins) from exc


def in_users_words(error: SettingsError, origins: Mapping[str, str]) -> SettingsError:
    """Return `error` with the option, the variable or the key that the user gave."""
    origin = origins[error.setting]
    return SettingsError(error.setting if origin == "default" else origin, error.problem)


def _flag(name: str, value: Any) -> bool:
    flag = _FLAGS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(flag, bool):
        raise SettingsError(name, f"expected true or false, got {value!r}")
    return flag


def _address(name: str, value: Any) -> Address | None:
    if value == "":
        return None
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match[3]) > _LAST_PORT:
        problem = f"expected ADDRESS:PORT, such as 127.0.0.1:9464 or [::1]:9464, got {value!r}"
        raise SettingsError(name, problem)
    return Address(match[1] or match[2], int(match[3]))


_ADDRESS: Final = re.compile(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^][:\/\s]+)):([0-9]{1,5})", re.ASCII)
_LAST_PORT: Final = 65535
_FLAGS: Final = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of settings that are not empty, each with the name of its setting."""
    found = {}
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable == CONFIG_VARIABLE or not value:
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name in _NAMES:
            found[variable] = name
        elif not _KUBERNETES.fullmatch(variable.removeprefix(ENV_PREFIX)):
            raise SettingsError(variable, "unknown setting; known: " + ", ".join(_NAMES))
    return found


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise SettingsError(str(path), f"cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:  # TOMLDecodeError and more are ValueErrors
        raise SettingsError(str(path), f"is not valid TOML: {exc}") from exc
    for name in values:
        if name not in _NAMES:
            raise SettingsError(f"{path}: {name}", "unknown setting; known: " + ", ".join(_NAMES))
    return values
