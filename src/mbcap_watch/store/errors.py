"""SQLite's errors as ours, with what is behind them.

SQLite names the call that failed, not the cause: a full disk may show as SQLITE_IOERR_SHMSIZE, a
read-only mount as SQLITE_CANTOPEN. So `explain` looks at the disk, the owners and the modes.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from typing import TYPE_CHECKING, Final

from mbcap_watch.errors import QUOTED, DatabaseBusy, DatabaseFailed, printable, without_frames
from mbcap_watch.limits import LIMIT_ERRORS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mbcap_watch.errors import Cause, DatabaseError

# What is beside a database, and has to be writable as well.
SIDES: Final = ("-wal", "-shm", "-journal")

# The least that a -shm grows by (sqlite.org/walformat.html): less room is none.
_LEAST_ROOM: Final = 32 << 10


@contextlib.contextmanager
def as_database_errors(database: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours, by their code (https://www.sqlite.org/rescode.html)."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as exc:
        raise _as_ours(database, without_frames(exc)) from exc


def _as_ours(database: Path, error: sqlite3.Error | UnicodeDecodeError) -> DatabaseError:
    if isinstance(error, UnicodeDecodeError):  # see `message`; our own SQL is UTF-8
        text = f"is corrupt: its schema holds text that is not UTF-8 ({message(error)})"
        return DatabaseFailed(database, text, "corrupt")
    if is_busy(error):
        return DatabaseBusy(database, "is locked by another connection")
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    problem, cause = explain(database, primary_code(error))
    said = printable(str(error), QUOTED)  # a trigger's message, say
    return DatabaseFailed(database, f"{problem} ({name}: {said})", cause)


def cause_of(error: OSError) -> Cause | None:
    """Return what is behind an error of the operating system about a file; None if nothing is."""
    if isinstance(error, PermissionError):
        return "not_permitted"
    if isinstance(error, FileNotFoundError | NotADirectoryError):  # without /proc, say
        return None
    return "limit" if error.errno in LIMIT_ERRORS else "disk_error"


def primary_code(error: BaseException) -> int:
    """Return SQLite's primary code; SQLITE_ERROR where it was Python that raised."""
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another connection has the lock."""
    return primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def refuses_rows(error: BaseException) -> bool:
    """Whether an error may be about single rows: a constraint, or what a trigger does or says."""
    code = getattr(error, "sqlite_errorcode", 0)
    about = code in _ABOUT_ROWS or code & 0xFF in _ABOUT_ROWS
    return about or isinstance(error, UnicodeDecodeError)


def message(error: sqlite3.Error | UnicodeDecodeError) -> str:
    """Return what SQLite says.

    Where its message quotes bytes of the database that are not UTF-8, Python fails to decode it
    and raises UnicodeDecodeError in place of SQLite's error, whose code is lost.
    """
    if isinstance(error, UnicodeDecodeError):
        return error.object.decode("utf-8", "backslashreplace")
    return str(error)


_ABOUT_ROWS: Final = (
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_CORRUPT_VTAB,  # of a virtual table that a trigger writes
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_TOOBIG,
)
_ABOUT_ROOM: Final = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_ABOUT_RIGHTS: Final = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY)
_PROBLEMS: Final[dict[int, tuple[str, Cause | None]]] = {
    sqlite3.SQLITE_CANTOPEN: ("cannot be opened", None),
    sqlite3.SQLITE_CORRUPT: ("is corrupt", "corrupt"),
    sqlite3.SQLITE_FULL: ("cannot grow", "disk_full"),
    sqlite3.SQLITE_IOERR: ("cannot be read or written", "disk_error"),
    sqlite3.SQLITE_NOTADB: ("is not an SQLite database", "not_a_database"),
    sqlite3.SQLITE_PERM: ("may not be accessed", "not_permitted"),
    sqlite3.SQLITE_READONLY: ("may not be written", None),
}


def explain(database: Path, code: int) -> tuple[str, Cause | None]:
    """Return what is behind SQLite's primary error code, for people and programs. Blocks."""
    problem, cause = _PROBLEMS.get(code, ("SQLite failed", None))
    with contextlib.suppress(OSError):  # what is there is out of reach
        if found := _obstacle(os.path.realpath(database), code):
            return f"{problem}: {found[0]}", found[1]
    return problem, cause


def _obstacle(real: str, code: int) -> tuple[str, Cause] | None:
    """Return what stands in the way; None if it is not to be seen."""
    if code not in {*_ABOUT_ROOM, *_ABOUT_RIGHTS} or not os.path.exists(real):
        return None
    directory = os.path.dirname(real)
    space = os.statvfs(directory)
    if space.f_flag & os.ST_RDONLY:
        return f"{directory} is on a filesystem that is mounted read-only", "read_only"
    if code in _ABOUT_RIGHTS:
        for path in (real, *(real + side for side in SIDES), directory):
            mode = os.W_OK | (os.X_OK if path == directory else os.R_OK)
            if os.path.exists(path) and not os.access(path, mode, effective_ids=True):
                what = "create -wal and -shm in" if path == directory else "write"
                owner, bits = os.stat(path).st_uid, stat.S_IMODE(os.stat(path).st_mode)
                text = f"user {os.geteuid()} may not {what} {path} (user {owner}, mode {bits:04o})"
                return text, "not_permitted"
    # Some filesystems do not say how much room they have.
    if code in _ABOUT_ROOM and space.f_blocks and space.f_bavail * space.f_frsize < _LEAST_ROOM:
        return f"the disk is full, there is no room left in {directory}", "disk_full"
    if code in _ABOUT_ROOM and space.f_files and not space.f_favail:
        return f"the disk is full, there is no inode left in {directory} (df -i)", "disk_full"
    return None
