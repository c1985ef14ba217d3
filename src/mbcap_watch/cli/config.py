"""Where a setting comes from: an option, the environment, a TOML file, or its default."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mbcap_watch.errors import QUOTED, SettingsError, printable
from mbcap_watch.settings import (
    CONFIG_FILE,
    CONFIG_VARIABLE,
    DATABASE_VARIABLE,
    DEFAULT_DATABASE,
    ENV_PREFIX,
    Choice,
    Setting,
    Settings,
    declared,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

# Kubernetes puts such variables into every container when a service is called "mbcap-watch".
_KUBERNETES = re.compile(r"(SERVICE_(HOST|PORT\w*)|PORT(_\w+)?)")

_ADDRESS: Final = re.compile(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^][:\/\s]+)):([0-9]{1,5})", re.ASCII)
_LAST_PORT: Final = 65535
_FLAGS: Final = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class Address(NamedTuple):
    """Where to listen; as text, an IPv6 address is in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ListenAt(Setting[str, Address | None]):
    """An address and a port; none if empty."""

    default = ""
    metavar = "ADDRESS:PORT"
    accepts = "ADDRESS:PORT, such as 127.0.0.1:9464 or [::1]:9464"

    def _read(self, value: Any) -> Address | None:
        if value == "":
            return None
        if (match := _ADDRESS.fullmatch(value)) is None or int(match[3]) > _LAST_PORT:
            raise ValueError
        return Address(match[1] or match[2], int(match[3]))


class Flag(Setting[bool | str, bool]):
    """Yes or no."""

    default = False
    metavar = "true|false"
    accepts = "true or false"

    def _read(self, value: Any) -> bool:
        flag = _FLAGS.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(flag, bool):
            raise TypeError
        return flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of the library, those of the command line alone, and where each came from.

    `file` is the TOML file that was read; None if there is none.
    """

    settings: Settings
    log_level: Choice[str] = Choice(
        "info", ("debug", "info", "warning", "error"), "What is logged on standard error."
    )
    log_format: Choice[str] = Choice("text", ("text", "json"), "How it is logged.")
    ack: Flag = Flag("Answer the publisher: result.json beside the snapshot.")
    http: ListenAt = ListenAt(
        "Serve /metrics and /healthz here, as 127.0.0.1:9464; needs the extra `metrics`."
    )
    origins: Mapping[str, str]
    file: Path | None = None


CLI_ONLY: Final = tuple(declared(Config))
DECLARED: Final = declared(Settings) | declared(Config)


def load(
    options: Mapping[str, Any], environ: Mapping[str, str], config_file: str | Path | None = None
) -> Config:
    """Merge all sources: option before environment before file before default.

    `options` are by setting, None if not given. An empty variable counts as not set. The TOML file
    is `config_file`, else that of `MBCAP_WATCH_CONFIG`, else `CONFIG_FILE` if it is there.

    Raises:
        SettingsError: an unknown name or a bad value; names the option, the variable, or the
            file and the key; of a long one the start.

    """
    values: dict[str, Any] = {"database": DEFAULT_DATABASE}
    origins = dict.fromkeys(DECLARED, "default")

    def take(name: str, value: Any, origin: str) -> None:
        if name not in DECLARED:
            raise SettingsError(origin, "unknown setting; known: " + ", ".join(DECLARED))
        values[name] = value
        origins[name] = origin

    named = config_file or environ.get(CONFIG_VARIABLE)
    file = Path(named or CONFIG_FILE)
    table = _read_toml(file, required=bool(named))
    for name, value in (table or {}).items():
        take(name, value, f"{named or file}: {printable(name, QUOTED)}")
    if environ.get(DATABASE_VARIABLE):
        take("database", environ[DATABASE_VARIABLE], DATABASE_VARIABLE)
    for variable, value in environ.items():
        name = variable.removeprefix(ENV_PREFIX)
        if name != variable != CONFIG_VARIABLE and value and not _KUBERNETES.fullmatch(name):
            take(name.lower(), value, printable(variable, QUOTED))
    for name in DECLARED:
        if options.get(name) is not None:
            take(name, options[name], option_name(name))

    ours = {name: values.pop(name) for name in CLI_ONLY if name in values}
    try:
        return Config(
            settings=Settings.from_mapping(values),
            origins=origins,
            file=None if table is None else file,
            **ours,
        )
    except SettingsError as exc:
        raise in_users_words(exc, origins) from exc


def option_name(name: str) -> str:
    """Return the option for a setting."""
    return "--" + name.replace("_", "-")


def in_users_words(error: SettingsError, origins: Mapping[str, str]) -> SettingsError:
    """Return `error` with the option, the variable or the key that the user gave."""
    origin = origins[error.setting]
    return SettingsError(error.setting if origin == "default" else origin, error.problem)


def _read_toml(path: Path, *, required: bool) -> dict[str, Any] | None:
    """Read a file; return None if it is not there and need not be."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        if isinstance(exc, FileNotFoundError | NotADirectoryError) and not required:
            return None
        raise SettingsError(str(path), f"cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:  # TOMLDecodeError and more are ValueErrors
        raise SettingsError(str(path), f"is not valid TOML: {exc}") from exc
