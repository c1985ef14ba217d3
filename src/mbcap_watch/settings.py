"""`Settings`: what the bridge can be told. Each setting is declared here, and nowhere else.

The command line, the environment, the TOML file and the pages about settings are made from it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, get_args, overload

from mbcap_watch.errors import QUOTED, SettingsError, printable, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Mode = Literal["auto", "inotify", "poll"]
Downgrade = Literal["allow", "hold", "never"]

SNAPSHOT_DIR_NAME = "mbcap-snapshot"

# The environment of the command line. `check` reads that of a running daemon, too.
ENV_PREFIX = "MBCAP_WATCH_"
CONFIG_VARIABLE = ENV_PREFIX + "CONFIG"
CONFIG_FILE = Path("/etc/mbcap-watch/mbcap-watch.toml")  # read if it is there and none is named
DATABASE_VARIABLE = "DB_PATH"  # CoreScope's own
DEFAULT_DATABASE = "data/meshcore.db"  # likewise

# 100,000 nodes. Whatever is in the file, reading it takes up to ten times as much memory, and the
# process 45 MiB besides: MemoryMax= of the units and mem_limit in compose allow for that.
DEFAULT_MAX_BYTES = 12 << 20

# A batch is one hold of the write lock. Larger ones gain nothing and hurt the other writers: of
# 50,000 changed rows, batches of 500, 2,000 and 10,000 held it for 1.7, 3.9 and 17 ms at most, and
# all took 0.27 s (to repeat: `apply --json` with `--batch-rows`, and look at `lock_seconds`). And a
# statement takes 32,766 parameters (https://www.sqlite.org/limits.html), of which a row has four.
MAX_BATCH_ROWS = 8_000

Given = TypeVar("Given")
Value = TypeVar("Value")


class Setting(Generic[Given, Value]):
    """A setting, as a descriptor: what is assigned to it is checked and converted.

    Attributes:
        default: as a person writes it.
        help: what it is for.
        metavar: what stands for a value in `--help`.
        accepts: which values are right.

    """

    default: Given
    metavar: str
    accepts: str

    def __init__(self, help: str) -> None:
        self.help = help

    def read(self, name: str, value: object) -> Value:
        """Return a value as it is kept.

        Raises:
            SettingsError: it is not right; names `name`.

        """
        try:
            return self._read(value)
        except (ValueError, TypeError, OverflowError) as exc:
            raise SettingsError(name, f"expected {self.accepts}, got {quoted(value)}") from exc

    def _read(self, value: Any) -> Value:
        raise NotImplementedError

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Given: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...
    def __get__(self, instance: object | None, owner: type) -> Any:
        if instance is None:
            return self.default  # AttributeError tells a dataclass that there is none
        return vars(instance)[self._name]

    def __set__(self, instance: object, value: Given) -> None:
        vars(instance)[self._name] = self.read(self._name, value)


class Location(Setting[str | os.PathLike[str] | None, Path]):
    """A path. Kept absolute, so that a later `chdir` changes nothing.

    Attributes:
        usual: where the command line looks, in words.

    """

    accepts = "a path"

    def __init__(self, metavar: str, help: str, *, usual: str, required: bool = False) -> None:
        super().__init__(help)
        self.metavar, self.usual = metavar, usual
        if not required:
            self.default = None

    def _read(self, value: Any) -> Path:
        if value is None and hasattr(self, "default"):
            return NO_PATH
        if not (text := os.fspath(value)) or not isinstance(text, str) or "\0" in text:
            raise ValueError
        try:
            os.fsencode(text)
            return Path(os.path.abspath(text))
        except UnicodeEncodeError as exc:
            problem = f"{quoted(text)} is no file name in {exc.encoding}"
            raise SettingsError(self._name, problem) from exc
        except OSError as exc:
            problem = f"{quoted(text)} is relative to a directory that is gone"
            raise SettingsError(self._name, problem) from exc


NO_PATH = Path()


class Choice(Setting[Value, Value]):
    """One of a few words."""

    def __init__(self, default: Value, choices: tuple[Value, ...], help: str) -> None:
        super().__init__(help)
        self.default, self.choices = default, choices
        self.metavar = "|".join(map(str, choices))
        self.accepts = f"one of {', '.join(map(str, choices))}"

    def _read(self, value: Any) -> Value:
        return self.choices[self.choices.index(value)]


class _Quantity(Setting[float | str, Value]):
    """A number, or text of a number and a unit; both ends of the range are right."""

    most: str
    units: ClassVar[Mapping[str, float]] = {}
    kept: Callable[[float], Value]

    def __init__(self, default: str, least: str, help: str) -> None:
        super().__init__(help)
        self.default = default
        self._range = self._number(least), self._number(self.most)
        self.accepts = f"a {self.metavar.lower()} from {least} to {self.most}"

    def _read(self, value: Any) -> Value:
        number = self._number(value)
        if not self._range[0] <= number <= self._range[1]:  # nor is NaN
            raise ValueError
        if (kept := type(self).kept(number)) != number:
            raise ValueError
        return kept

    def _number(self, value: Any) -> float:
        unit = 1.0
        if isinstance(value, str):
            match = _QUANTITY.fullmatch(value.strip())
            if match is None or (match[2] and match[2] not in self.units):
                raise ValueError
            value, unit = float(match[1]), self.units.get(match[2], 1.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError
        return value * unit


_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", re.ASCII)


class Duration(_Quantity[float]):
    """Seconds."""

    metavar = "DURATION"
    most = "168h"
    units: ClassVar = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
    kept = float


class Rows(_Quantity[int]):
    """A whole number."""

    metavar = "NUMBER"
    most = str(MAX_BATCH_ROWS)
    kept = int


class Size(_Quantity[int]):
    """Bytes."""

    metavar = "SIZE"
    most = "1024GiB"
    units: ClassVar = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    kept = int


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything the bridge can be told. Frozen, and validated when made.

    Durations are seconds, sizes are bytes; both may be given as text with a unit (`"250ms"`,
    `"5s"`, `"10m"`, `"64MiB"`). Relative paths are taken from the working directory of the moment.
    What each is for stands beside it.

    Raises:
        SettingsError: a value is out of range or of the wrong type; names the setting.

    """

    database: Location = Location(
        "FILE", "CoreScope's SQLite database. Never created.", usual=DEFAULT_DATABASE, required=True
    )
    snapshot_dir: Location = Location(
        "DIR",
        "Where snapshot.json is.",
        usual=f"{SNAPSHOT_DIR_NAME} beside the database",
    )
    mode: Choice[Mode] = Choice(
        "auto", get_args(Mode), "How changes are noticed; auto: inotify where it works, else poll."
    )
    poll_interval: Duration = Duration("1s", "10ms", "Between two syncs when polling.")
    sweep_interval: Duration = Duration(
        "5s", "10ms", "Between checks for a dead watch or a missed change, and between retries."
    )
    resync: Duration = Duration(
        "5m", "100ms", "Between comparisons while the file stays the same: nodes may be new."
    )
    debounce: Duration = Duration(
        "100ms", "0s", "A burst's first change is served at once, the rest after so much quiet."
    )
    max_wait: Duration = Duration(
        "1s", "0s", "How long a burst can postpone a sync; debounce, if that is longer."
    )
    batch_rows: Rows = Rows("500", "1", "Rows written per hold of the write lock.")
    busy_deadline: Duration = Duration(
        "30s", "0s", "How long a locked database is tried before that is reported."
    )
    wal_grace: Duration = Duration(
        "1m", "0s", "How long a -wal that nobody has open is left alone: time to restore a backup."
    )
    max_bytes: Size = Size(
        f"{DEFAULT_MAX_BYTES >> 20}MiB",
        "1B",
        "Refuse larger snapshots. Reading takes ten times the size in memory.",
    )
    downgrade: Choice[Downgrade] = Choice(
        "allow",
        get_args(Downgrade),
        "Whether suspected may replace a stored confirmed; hold: after downgrade_hold.",
    )
    downgrade_hold: Duration = Duration(
        "10m", "100ms", "How long every snapshot has to ask for a downgrade; with downgrade = hold."
    )

    def __post_init__(self) -> None:
        if self.snapshot_dir == NO_PATH:
            self.__dict__["snapshot_dir"] = self.database.parent / SNAPSHOT_DIR_NAME

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Make settings from untyped values, such as a TOML table.

        Raises:
            SettingsError: a name is unknown, a value is unusable, or `database` is missing.

        """
        for name in values:
            if name not in SETTING_NAMES:
                problem = f"unknown setting; known: {', '.join(SETTING_NAMES)}"
                raise SettingsError(printable(f"{name}", QUOTED), problem)
        if "database" not in values:
            raise SettingsError("database", "is not set")
        return cls(**values)


def declared(owner: type) -> dict[str, Setting[Any, Any]]:
    """Return the settings that a class declares, by name."""
    return {name: each for name, each in vars(owner).items() if isinstance(each, Setting)}


SETTING_NAMES = tuple(declared(Settings))
