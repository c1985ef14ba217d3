"""A database that is open only to be read: no file appears, vanishes or changes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from mbcap_watch.errors import DatabaseBusy, DatabaseFailed
from mbcap_watch.store import wal
from mbcap_watch.store.descriptors import opening_lock
from mbcap_watch.store.errors import as_database_errors
from mbcap_watch.store.forks import forks
from mbcap_watch.store.native import attach, file_identity, stamp_of, uri_of
from mbcap_watch.store.wal import Wal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# How long one that only reads waits for a lock that keeps readers out.
_READ_SECONDS: Final = 0.1


class ReadOnly(NamedTuple):
    """A database that is open for reading, and what lay beside it."""

    connection: sqlite3.Connection
    found: Wal


@contextlib.contextmanager
def open_to_read(path: Path, grace: float, timeout: float = _READ_SECONDS) -> Iterator[ReadOnly]:
    """Open the database so that no file appears, vanishes or changes. Blocks.

    Whoever opens a WAL database creates -wal and -shm where they are missing, `mode=ro` or not.
    Where one is missing, nobody has it open, and `immutable` does without (sqlite.org/uri.html).

    Raises:
        DatabaseMissing, ForeignWal, DatabaseFailed: as `open_database`.
        DatabaseBusy: or somebody opened the database meanwhile, so that what was read may be torn.

    """
    identity = file_identity(path)
    with as_database_errors(path), forks.wait(), contextlib.ExitStack() as stack:
        with opening_lock(path):
            found = wal.require_own_wal(path, grace)
            before = stamp_of(path)
            alone = found is not Wal.LEFT_BEHIND and not _is_shared(path)
            immutable = alone and wal.is_wal_database(path)
            uri = f"{uri_of(path)}?mode=ro{'&immutable=1' if immutable else ''}"
            connection = sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None)
            stack.enter_context(contextlib.closing(connection))
            if file_identity(path) != identity:
                raise DatabaseFailed(path, "was replaced while it was being opened")
            attach(connection)
        connection.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
        yield ReadOnly(connection, found)
        if immutable and (_is_shared(path) or stamp_of(path) != before):
            raise DatabaseBusy(path, "was opened by another process while it was being read")


def _is_shared(path: Path) -> bool:
    """Whether the files are there without which nobody can have a WAL database open."""
    return all(os.path.exists(os.path.realpath(path) + side) for side in ("-wal", "-shm"))
