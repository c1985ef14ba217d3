"""SQLite's own connection, to write beside others."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
import sys
import time
from functools import cache
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from mbcap_watch.errors import DatabaseBusy, DatabaseFailed, DatabaseMissing
from mbcap_watch.store import wal
from mbcap_watch.store.descriptors import identity_of, opening_lock
from mbcap_watch.store.errors import cause_of
from mbcap_watch.store.wal import Wal

if TYPE_CHECKING:
    from pathlib import Path

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

# UPDATE … FROM (https://www.sqlite.org/lang_update.html).
LEAST_SQLITE: Final = (3, 33)

# The first moves what was written into the database, and holds up neither readers nor writers. The
# second empties the WAL (https://www.sqlite.org/pragma.html#pragma_wal_checkpoint). If one fails,
# on a full disk, say, what was committed is safe in the WAL all the same.
_EMPTY: Final = ("PRAGMA wal_checkpoint(PASSIVE)", "PRAGMA wal_checkpoint(TRUNCATE)")

OVERWRITTEN: Final = "was overwritten by another process meanwhile"

# After which pauses emptying the WAL is tried while somebody reads from it.
_EMPTY_PAUSES: Final = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.2)


class Connection(sqlite3.Connection):
    """A connection that writes: set up when opened, and leaving the WAL as it was when closed.

    If the file was overwritten, `is_undone` says then whether what it had committed was dropped.

    `grace` as in `wal.require_own_wal`. `owes_checkpoint` says whether the connection before could
    not empty the WAL that it filled; once it is closed, it says so of this one.
    """

    def __init__(self, path: Path, grace: float, *, owes_checkpoint: bool) -> None:
        if sqlite3.sqlite_version_info < LEAST_SQLITE:
            text = f"needs SQLite {'.'.join(map(str, LEAST_SQLITE))} or newer"
            raise DatabaseFailed(path, f"{text}, and Python has {sqlite3.sqlite_version}")
        self._path, self._real = path, os.path.realpath(path)
        self._wal = f"{self._real}-wal"
        self.owes_checkpoint, self.is_undone = owes_checkpoint, False
        for name in sys.modules.keys() & _OTHER_LIBRARIES:
            _warn_of_second_sqlite(name)
        with opening_lock(path):
            self._identity = file_identity(path)
            self._found = wal.require_own_wal(path, grace)
            self._stamp = stamp_of(path)
            uri = f"{uri_of(path)}?mode=rw"
            super().__init__(
                uri, timeout=0, isolation_level=None, check_same_thread=False, uri=True
            )
            try:
                # Else it was replaced before it was opened. What was not read leaves the -wal alone
                # when it is closed.
                self._require_same_database()
                attach(self)
                self._is_wal = self.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
                if self._is_wal:
                    # Do not flush to disk or checkpoint while holding the lock. In WAL mode, NORMAL
                    # cannot corrupt a database; a power cut may lose the last commits, which the
                    # sync at the next start repeats
                    # (https://www.sqlite.org/pragma.html#pragma_synchronous).
                    self.execute("PRAGMA synchronous = NORMAL")
                    self.execute("PRAGMA wal_autocheckpoint = 0")
                self._beside = self._find_beside()
                self._first_version = self._version()
                # Whether nobody else has written what is in the -wal by now.
                was_empty = self._found in (Wal.ABSENT, Wal.EMPTY) and not _size(self._wal)
                self._is_own = owes_checkpoint or was_empty
                self.require_same_files()  # else the -wal may be that of the file before it
            except BaseException:
                self._close_not_as_last()
                raise

    def require_same_files(self) -> None:
        """Never write into files that an operator has just replaced or removed.

        Raises:
            DatabaseMissing, DatabaseFailed: another file is at the path now, or none.
            DatabaseBusy: a file beside it is gone, or it was overwritten. The next connection sees
                the files as they are then.

        """
        self._require_same_database()
        if lost := self._lost():
            raise DatabaseBusy(self._path, f"had its {lost} removed by another process meanwhile")
        if self._is_overwritten():
            raise DatabaseBusy(self._path, OVERWRITTEN)

    def _require_same_database(self) -> None:
        if file_identity(self._path) != self._identity:
            raise DatabaseFailed(self._path, "was replaced while it was open")

    def _lost(self) -> str:
        """Return which file beside the database was removed or replaced, if one was.

        Without the -shm, everybody who opens the database now has another one, and no lock of ours.
        """
        now = self._find_beside()
        for side, was in self._beside.items():
            if now[side] != was if was else self._is_wal:
                return side
        return ""

    def _is_overwritten(self) -> bool:
        """Whether the file was written to, although nobody else has committed.

        What was read may be of the file before. Known only where the -wal had nothing of others:
        there was nothing for a checkpoint to move. What we wrote since, another may have moved.
        """
        now = stamp_of(self._path)
        is_changed = now[0] == self._stamp[0] and now != self._stamp
        if not (self._is_wal and self._is_own and is_changed):
            return False
        version, (moved, to_move) = self._version(), wal.checkpointed(self._path, self._real)
        if version is None or (version == self._first_version and not to_move):
            return True
        if moved == to_move:  # else a checkpoint goes on
            self._stamp = now
        return False

    def _version(self) -> int | None:
        """Return what changes with the commits of others alone; None if SQLite refuses the file."""
        with contextlib.suppress(sqlite3.Error):
            return int(self.execute("PRAGMA data_version").fetchone()[0])
        return None

    def _find_beside(self) -> dict[str, tuple[int, int] | None]:
        return {side: identity_of(f"{self._real}{side}") for side in ("-wal", "-shm")}

    def close(self) -> None:
        """Close, and leave the WAL as it was found."""
        try:
            self._tidy()
        finally:
            is_another = self._is_overwritten()
            drops = is_another and self._is_own and self._version() == self._first_version
            if is_another or self._leaves_files():
                self._close_not_as_last()
            else:
                super().close()
        if drops and not self._lost() and not wal.is_open(self._path, self._real):
            # It is of the file before, and would be replayed into the other one.
            self.is_undone = _size(self._wal) > 0
            with contextlib.suppress(OSError):
                os.truncate(self._wal, 0)

    def _tidy(self) -> None:
        """Empty the WAL if it was empty.

        Otherwise a checkpoint is left to others: what they wrote may belong to a file that was
        there before, if a backup was copied over the database while they had it open.
        """
        if not self._is_own or not (self.owes_checkpoint or self.total_changes):
            return
        self.owes_checkpoint = False
        # What stays in it would be replayed into a backup that is put in place now. Where a reader
        # stays attached, closing alone does not empty it.
        for pause in _EMPTY_PAUSES:
            time.sleep(pause)
            if self._lost() or self._is_overwritten():
                return
            for sql in _EMPTY:  # the slow part first, without the write lock
                with contextlib.suppress(sqlite3.Error):
                    self.execute(sql).close()
            if not _size(self._wal):
                self._stamp = stamp_of(self._path)
                return
        self.owes_checkpoint = not self._is_overwritten()

    def _leaves_files(self) -> bool:
        """Whether -wal and -shm stay, even if this is the last connection.

        SQLite's last connection moves the WAL into the database and removes it. That is wrong
        - for an empty -wal that was there before: a read-only server that opens the database at
          this moment would find it locked;
        - for what others wrote, if they were killed meanwhile: see `_tidy`;
        - for what was left behind, if we only read, and for what replaced a -wal that was removed.
        """
        if self._lost():
            return True
        if self._found is Wal.LEFT_BEHIND:
            return self.total_changes == 0
        if self._found is Wal.IN_USE:
            return not wal.is_open(self._path, self._real, elsewhere=True)
        return self._found is Wal.EMPTY and not _size(self._wal)

    def _close_not_as_last(self) -> None:
        """Close while the database is locked as if somebody else had it open.

        `SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE` would do the same, from Python 3.12 on. Of a file that
        was replaced SQLite removes nothing anyhow.
        """
        with wal.held_open(self._path, self._real):
            super().close()


@cache
def _warn_of_second_sqlite(name: str) -> None:
    """Warn, once a process, of another SQLite library in it.

    POSIX locks belong to the process: two libraries do not keep each other out, and the database
    is damaged (sqlite.org/howtocorrupt.html, 2.2.1).
    """
    logger.warning(
        "%s is loaded beside Python's sqlite3: if both open this database in one process, it is"
        " damaged, because their locks do not keep each other out; open it with one of them only",
        name,
    )


def file_identity(path: Path) -> tuple[int, int]:
    """Return which file is at the path of the database.

    Raises:
        DatabaseMissing, DatabaseFailed: there is none, or none that can be a database.

    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise DatabaseMissing(path, "does not exist") from exc
    except OSError as exc:
        raise DatabaseFailed(path, f"cannot be reached: {exc.strerror}", cause_of(exc)) from exc
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory, " if stat.S_ISDIR(status.st_mode) else ""
        raise DatabaseFailed(path, f"is {kind}not a regular file", "not_a_file")
    return status.st_dev, status.st_ino


def attach(connection: sqlite3.Connection) -> None:
    """Read once: only then does SQLite open the `-wal` and take the locks that say so."""
    connection.execute("PRAGMA schema_version").fetchone()


def uri_of(path: str | Path) -> str:
    """Return the path as a URI for SQLite, without its parameters (sqlite.org/uri.html)."""
    return f"file://{quote(os.fsencode(os.path.abspath(path)))}"


def _size(path: str) -> int:
    """Return the size of a file in bytes; 0 if there is none."""
    return stamp_of(path)[1]


def stamp_of(path: str | Path) -> tuple[int, int, int]:
    """Return what tells that a file was replaced or written to; zeros if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns
