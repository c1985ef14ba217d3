"""SQLite's own connection, set up for writing beside others."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

# Moves what was written into the database, with the lock free. A passive one holds up neither
# readers nor writers (https://www.sqlite.org/pragma.html#pragma_wal_checkpoint). If it fails, on a
# full disk, say, what was committed is safe in the WAL all the same, and a later one does it.
CHECKPOINT: Final = "PRAGMA wal_checkpoint(PASSIVE)"

# A WAL that has grown to this size is due for one as well: perhaps nobody else does it. It keeps
# its size when it is filled anew from the start, so only growth tells that it is full.
CHECKPOINT_BYTES: Final = 4 << 20


class Connection(sqlite3.Connection):
    """SQLite's connection: set up when opened, and leaving the WAL in order when closed."""

    def __init__(self, path: Path, /, *args: Any, **kwargs: Any) -> None:
        self._wal = f"{os.path.realpath(path)}-wal"
        self._wal_size = _size(self._wal)
        super().__init__(*args, **kwargs)
        try:
            self._set_up()
        except BaseException:
            super().close()
            raise

    def _set_up(self) -> None:
        """Do not flush to disk or checkpoint while holding the lock, where that is safe.

        In WAL mode `synchronous=NORMAL` cannot corrupt a database; a power cut may lose the last
        commits (https://www.sqlite.org/pragma.html#pragma_synchronous), and the sync at the next
        start repeats them. SQLite's automatic checkpoint would come inside a COMMIT, and make the
        longest batches ten times as long. These are properties of this connection alone.
        """
        self._leave_wal_alone(alone=self._wal_size > 0)
        if self.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
            self.execute("PRAGMA synchronous = NORMAL")
            self.execute("PRAGMA wal_autocheckpoint = 0")

    def close(self) -> None:
        """Close, and leave no large WAL behind."""
        try:
            if self.total_changes:
                self._leave_wal_alone(alone=False)
                size = _size(self._wal)
                if size >= CHECKPOINT_BYTES and size > self._wal_size:
                    with contextlib.suppress(sqlite3.Error):
                        self.execute(CHECKPOINT)
        finally:
            super().close()

    def _leave_wal_alone(self, *, alone: bool) -> None:
        """Say whether closing the last connection may move the WAL into the database.

        Whoever only reads must not write, and that includes what a crashed process left behind.
        Where there was nothing, SQLite is to remove its empty -wal and -shm as usual: left here,
        they would belong to us, and could lock out another user's ingestor. Before Python 3.12
        this cannot be said, and SQLite always tidies up.
        """
        if sys.version_info >= (3, 12):
            self.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, alone)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
