"""Every error of this package, as types.

A message names the file, says what is wrong, and what happens next (`hint`). Nothing in this
package decides by the text of a message.
"""

from __future__ import annotations

import os
import re
from typing import ClassVar, Final, Literal, TypeVar

Cause = Literal[
    "disk_full",
    "read_only",
    "not_permitted",
    "not_a_file",
    "not_a_database",
    "corrupt",
    "disk_error",
    "limit",
    "snapshot_unreadable",
    "filesystem_failed",
    "no_database",
    "wal_replaced",
    "wal_left_behind",
    "wal_elsewhere",
    "nodes_not_served",
]
"""What is behind an error, as far as it can be told, for programs.

`no_database` is behind no error: there is no snapshot yet, and no database either.
`nodes_not_served` is behind no error, either: the other table was compared.
"""


T = TypeVar("T", bound=BaseException)

# How much of what a file or a database says is shown to people.
QUOTED: Final = 100

# What Unicode tells to ignore, and what leaves a gap at best, though Python calls it printable.
_INVISIBLE: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)


def printable(text: str, limit: int | None = None) -> str:
    """Return `text` safe for people, on one line: what is not plainly seen becomes an escape.

    That is what a terminal obeys, ends a line, changes the direction of writing or is invisible,
    and bytes of a path that are no text. Doing it twice changes nothing.

    Args:
        text: from anywhere.
        limit: the most characters to return; of longer text the start, and "…".

    """
    shown = text[:limit]
    if not shown.isprintable() or _INVISIBLE.search(shown):
        shown = "".join(
            char if char.isprintable() and not _INVISIBLE.match(char) else ascii(char)[1:-1]
            for char in shown
        )
    if limit is not None and max(len(text), len(shown)) > limit:
        return f"{shown[: limit - 1]}…"
    return shown


def counted(count: int, one: str, several: str, separator: str = ",") -> str:
    """Return a count for people: `1 entry`, `2,400 entries`."""
    return f"{count:{separator}} {one if count == 1 else several}"


def quoted(value: object) -> str:
    """Return what a file or a database said as Python writes it, safe and at most `QUOTED` long."""
    said = value[:QUOTED] if isinstance(value, str | bytes) else value
    return printable(repr(said), QUOTED)


def without_frames(error: T) -> T:
    """Return the error without its frames, and without the errors behind it and theirs.

    The frames may hold the whole snapshot, and one of them the error: aiosqlite's has the future
    with the error in it. Only Python's collector would free all that, perhaps minutes later.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


class MbcapWatchError(Exception):
    """Base of all errors raised by this package."""


class SettingsError(MbcapWatchError):
    """A setting has an unknown name or an unusable value.

    Attributes:
        setting: the name as the user wrote it; of a long unknown one the start.
        problem: what is wrong with it, and what would be right.

    """

    def __init__(self, setting: str, problem: str) -> None:
        super().__init__(setting, problem)
        self.setting = setting
        self.problem = problem

    def __str__(self) -> str:
        return printable(f"{self.setting}: {self.problem}")


class EventLoopError(MbcapWatchError):
    """The caller runs on no event loop that will do.

    The bridge serves hosts on asyncio and on trio; a connection of aiosqlite needs asyncio.
    """


class _FileError(MbcapWatchError):
    """What is wrong with a file, and what happens next.

    Attributes:
        path: of the file.
        problem: what is wrong.
        cause: what is behind it; None if that cannot be told.

    """

    hint: ClassVar[str] = ""
    cause: Cause | None = None

    def __init__(
        self, path: str | os.PathLike[str], problem: str, cause: Cause | None = None
    ) -> None:
        super().__init__(path, problem)
        self.path = os.fspath(path)
        self.problem = problem
        self.cause = cause or self.cause

    @property
    def what(self) -> str:
        """What is wrong with which file, without what happens next."""
        return printable(f"{self.path}: {self.problem}")

    def __str__(self) -> str:
        return f"{self.what}; {self.hint}"


class SnapshotError(_FileError):
    """Something about the snapshot file; the database was not touched."""


class SnapshotNotFound(SnapshotError):
    """There is no snapshot: nothing to persist. Callers wait, or go on.

    Attributes:
        unusual: whether something stands where the snapshot should be (a file in place of the
            directory, a symbolic link to nothing), which an operator wants to know.

    """

    hint = "there is nothing to persist until one is published"

    def __init__(
        self, path: str | os.PathLike[str], problem: str, *, unusual: bool = False
    ) -> None:
        super().__init__(path, problem)
        self.unusual = unusual


class SnapshotMalformed(SnapshotError):
    """The bytes are not a snapshot as a whole; no part of it is applied."""

    hint = "the database stays as it is and the file is read again"


class SnapshotRefused(SnapshotError):
    """The file is not regular, larger than allowed, or behind a link of another user (`links`)."""

    hint = "it is not decoded; it is tried again when it is replaced"


class SnapshotUnreadable(SnapshotError):
    """The operating system refused to read the file (permission, I/O, a stale handle).

    If its `cause` is `limit`, not the file is refused, but a descriptor or memory.
    """

    hint = "the database stays as it is and the file is tried again"
    cause: Cause | None = "snapshot_unreadable"


class SnapshotNotPublished(SnapshotError):
    """The new snapshot could not be written or renamed into place."""

    hint = "the file there is whole: the one before or, if only syncing failed, the new one"


class DatabaseError(_FileError):
    """Something about the database; what was already written stays and is right."""


class TransactionOpen(DatabaseError):
    """The host's connection is in a transaction; it is neither used nor committed."""

    hint = "nothing was read or written"


class DatabaseMissing(DatabaseError):
    """There is no database file; it is never created here."""

    hint = "it is never created here; the snapshot is applied once it appears"


class SchemaMissing(DatabaseError):
    """Neither table has the columns; they are never added here."""

    hint = "tables and columns are never added here; the snapshot is applied once they appear"


class ForeignWal(DatabaseError):
    """The `-wal` beside the database is not its own, or may not be; the database is not opened.

    Its `cause` is `wal_replaced` if it belongs to the file that was at the path before, and that
    somebody still has open; `wal_left_behind` if nobody has the database open, and its files were
    touched a moment ago; `wal_elsewhere` if somebody has it open with another `-wal`: by another
    path (the file is mounted alone, or is a hard link), or with one that was removed.
    """

    hint = (
        "it is not opened, because that can damage it; this is over once the ingestor has opened"
        " this file, or a -wal that nobody has open was left alone for wal_grace; after a restore,"
        " remove the -wal and -shm"
    )


class DatabaseBusy(DatabaseError):
    """Another connection kept the lock for longer than we wait, or files changed under ours."""

    hint = "nothing is lost; the snapshot stays pending and is tried again"


class DatabaseFailed(DatabaseError):
    """SQLite or the disk refused: corrupt, read-only, full, out of reach, or replaced."""

    hint = "the snapshot stays pending and is tried again"
