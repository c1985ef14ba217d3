"""`Settings`: what the bridge can be told, with defaults and validation."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mbcap_watch.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

Mode = Literal["auto", "inotify", "poll"]
Downgrade = Literal["allow", "never"]

SNAPSHOT_DIR_NAME = "mbcap-snapshot"

# The environment of the command line. `check` reads that of a running daemon, too.
ENV_PREFIX = "MBCAP_WATCH_"
CONFIG_VARIABLE = ENV_PREFIX + "CONFIG"
DATABASE_VARIABLE = "DB_PATH"  # CoreScope's own
DEFAULT_DATABASE = "data/meshcore.db"  # likewise

# 100,000 nodes. Whatever is in the file, reading it takes up to ten times as much memory, and the
# process 45 MiB besides: MemoryMax= of the units and mem_limit in compose allow for that.
DEFAULT_MAX_BYTES = 12 << 20

_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", re.ASCII)

# A batch is one hold of the write lock. Larger ones gain nothing and hurt the other writers: of
# 50,000 changed rows, batches of 500, 2,000 and 10,000 held it for 1.7, 3.9 and 17 ms at most, and
# all took 0.27 s (to repeat: `apply --json` with `--batch-rows`, and look at `lock_seconds`). And a
# statement takes 32,766 parameters (https://www.sqlite.org/limits.html), of which a row has four.
MAX_BATCH_ROWS = 8_000
_MAX_SECONDS = 7 * 24 * 3600.0


@dataclasses.dataclass(frozen=True, slots=True, init=False)
class Settings:
    """Everything the bridge can be told. Frozen, and validated when made.

    Durations are seconds, sizes are bytes; both may be given as text with a unit (`"250ms"`,
    `"5s"`, `"10m"`, `"64MiB"`). Relative paths are taken from the working directory of the moment
    and kept absolute, so that a later `chdir` changes nothing.

    Attributes:
        database: the SQLite database that CoreScope's ingestor owns. Never created.
        snapshot_dir: the directory of `snapshot.json`; by default `mbcap-snapshot` beside the
            database.
        mode: how changes are noticed: `auto` (inotify where the filesystem delivers it, polling
            elsewhere), `inotify` or `poll`.
        poll_interval: seconds between two syncs when polling.
        sweep_interval: seconds between two checks, under inotify, that the watch is alive and that
            no change was missed; also the slow pace of retries.
        resync: seconds between two comparisons with the database although the file did not
            change: nodes that appear later get their value then.
        debounce: seconds of quiet that a burst of changes is given before the next sync; the first
            change of a burst is served at once.
        max_wait: seconds by which an unending burst can postpone a sync at most; `debounce`, if
            that is longer.
        batch_rows: rows written per hold of the write lock.
        busy_deadline: seconds for which a busy database is tried before that is reported.
        wal_grace: seconds for which a `-wal` that nobody has open is left alone before SQLite may
            recover it: time for an operator who restores a backup to remove it.
        max_bytes: a larger snapshot is refused without being read.
        downgrade: whether `suspected` may replace a stored `confirmed`: `allow` or `never`.

    Raises:
        SettingsError: a value is out of range or of the wrong type; names the setting.

    """

    database: Path
    snapshot_dir: Path
    mode: Mode
    poll_interval: float
    sweep_interval: float
    resync: float
    debounce: float
    max_wait: float
    batch_rows: int
    busy_deadline: float
    wal_grace: float
    max_bytes: int
    downgrade: Downgrade

    def __init__(
        self,
        database: str | os.PathLike[str],
        snapshot_dir: str | os.PathLike[str] | None = None,
        mode: Mode = "auto",
        poll_interval: float | str = 1.0,
        sweep_interval: float | str = 5.0,
        resync: float | str = 300.0,
        debounce: float | str = 0.1,
        max_wait: float | str = 1.0,
        batch_rows: int = 500,
        busy_deadline: float | str = 30.0,
        wal_grace: float | str = 60.0,
        max_bytes: int | str = DEFAULT_MAX_BYTES,
        downgrade: Downgrade = "allow",
    ) -> None:
        path = _path("database", database)
        beside = path.parent / SNAPSHOT_DIR_NAME
        values = {
            "database": path,
            "snapshot_dir": beside if snapshot_dir is None else _path("snapshot_dir", snapshot_dir),
            "mode": choice("mode", mode, get_args(Mode)),
            "poll_interval": duration("poll_interval", poll_interval, 0.01),
            "sweep_interval": duration("sweep_interval", sweep_interval, 0.01),
            "resync": duration("resync", resync, 0.1),
            "debounce": duration("debounce", debounce, 0.0),
            "max_wait": duration("max_wait", max_wait, 0.0),
            "batch_rows": _whole("batch_rows", batch_rows, 1, MAX_BATCH_ROWS),
            "busy_deadline": duration("busy_deadline", busy_deadline, 0.0),
            "wal_grace": duration("wal_grace", wal_grace, 0.0),
            "max_bytes": _size("max_bytes", max_bytes),
            "downgrade": choice("downgrade", downgrade, get_args(Downgrade)),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the way into a frozen dataclass

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Make settings from untyped values, such as a TOML table.

        Raises:
            SettingsError: a name is unknown, a value is unusable, or `database` is missing.

        """
        for name in values:
            if name not in SETTING_NAMES:
                raise SettingsError(name, "unknown setting; known: " + ", ".join(SETTING_NAMES))
        if "database" not in values:
            raise SettingsError("database", "is not set")
        return cls(**values)


SETTING_NAMES = tuple(field.name for field in dataclasses.fields(Settings))


def _path(name: str, value: object) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not (text := os.fspath(value)):
        raise SettingsError(name, f"expected a path, got {value!r}")
    if not isinstance(text, str) or "\0" in text:
        raise SettingsError(name, f"not a usable path: {value!r}")
    try:
        return Path(os.path.abspath(text))
    except OSError as exc:
        raise SettingsError(name, f"{text} is relative to a directory that is gone") from exc


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return `value`, which is one of `choices`.

    Raises:
        SettingsError: it is not; names `name`.

    """
    if value not in choices:
        raise SettingsError(name, f"expected one of {', '.join(choices)}, got {value!r}")
    return str(value)


def duration(name: str, value: object, least: float) -> float:
    """Return a duration in seconds; `least` is the shortest that is right.

    Raises:
        SettingsError: it is none, or out of range; names `name`.

    """
    seconds = _number(name, value, _DURATION_UNITS, "seconds or text such as '250ms', '5s', '10m'")
    if not least <= seconds <= _MAX_SECONDS:
        raise SettingsError(
            name, f"must be between {least:g} s and {_MAX_SECONDS:g} s, got {value!r}"
        )
    return seconds


def _size(name: str, value: object) -> int:
    expected = "a number of bytes or text such as '64MiB'"
    size = _number(name, value, _SIZE_UNITS, expected)
    if size < 1 or size != int(size):
        raise SettingsError(name, f"expected {expected}, at least one byte, got {value!r}")
    return int(size)


def _whole(name: str, value: object, least: int, most: int) -> int:
    number = _number(name, value, {}, "a whole number")
    if number != int(number) or not least <= number <= most:
        raise SettingsError(name, f"expected a whole number from {least} to {most}, got {value!r}")
    return int(number)


def _number(name: str, value: object, units: Mapping[str, float], expected: str) -> float:
    """Read a number, or text of a number and one of `units`."""
    number, unit = value, 1.0
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value.strip())
        if match is None or (match[2] and match[2] not in units):
            raise SettingsError(name, f"expected {expected}, got {value!r}")
        number, unit = float(match[1]), units.get(match[2], 1)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise SettingsError(name, f"expected {expected}, got {value!r}")
    try:
        result = float(number) * unit
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise SettingsError(name, f"expected {expected}, got {value!r}")
    return result
