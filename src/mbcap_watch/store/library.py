"""The SQLite library: what is wrong with its version, and a second one in the process."""

from __future__ import annotations

import functools
import logging
import sqlite3
import sys
from typing import Final

logger = logging.getLogger("mbcap_watch")

_OTHER_LIBRARIES: Final = ("apsw", "pysqlite3", "sqlcipher3", "pysqlcipher3")

_MENDED: Final = {(3, 44): 6, (3, 50): 7}  # the first patch without the WAL-reset bug


def has_reset_bug(version: tuple[int, int, int]) -> bool:
    """Whether two checkpoints at the same time may lose what is in the WAL.

    SQLite 3.7.0 to 3.51.2 have the bug; it was mended in 3.44.6 and 3.50.7 as well
    (https://www.sqlite.org/wal.html, "The WAL-Reset Bug").
    """
    patch = _MENDED.get(version[:2])
    return (3, 7, 0) <= version < (3, 51, 3) and (patch is None or version[2] < patch)


HAS_RESET_BUG: Final = has_reset_bug(sqlite3.sqlite_version_info)


def warn_of_second_sqlite() -> None:
    """Warn, once a process, of another SQLite library in it.

    POSIX locks belong to the process: two libraries do not keep each other out, and the database
    is damaged (sqlite.org/howtocorrupt.html, 2.2.1).
    """
    for name in _OTHER_LIBRARIES:
        if name in sys.modules:
            _warn_once(name)


@functools.cache
def _warn_once(name: str) -> None:
    logger.warning(
        "%s is loaded beside Python's sqlite3: if both open this database in one process, it is"
        " damaged, because their locks do not keep each other out; open it with one of them only",
        name,
    )
