"""`check`, the database: from outside (its place, its rights, its disk), and from inside.

Nothing is written and no lock is taken. The comparison with the snapshot is the store's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import sqlite3
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mbcap_watch import errors
from mbcap_watch.doctor import machine
from mbcap_watch.doctor.findings import Finding, Installation, ok, quote, size
from mbcap_watch.doctor.machine import Place, place
from mbcap_watch.errors import QUOTED, counted, printable
from mbcap_watch.settings import DATABASE_VARIABLE
from mbcap_watch.store.descriptors import release
from mbcap_watch.store.errors import SIDES
from mbcap_watch.store.native import HAS_RESET_BUG
from mbcap_watch.store.reader import open_to_read
from mbcap_watch.store.reconcile import Tally, reconcile
from mbcap_watch.store.steps import TABLES, preview_steps
from mbcap_watch.store.wal import Wal, is_wal_database
from mbcap_watch.watcher.mounts import INOTIFY_FILESYSTEMS, UNKNOWN, Mount, mount_of, mount_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mbcap_watch.settings import Settings
    from mbcap_watch.store.plan import Value

# For how long a lock that keeps readers out is waited for.
BUSY_SECONDS: Final = 2.0

_TRIES: Final = 5

_LARGE_WAL: Final = 64 << 20

_LOCAL: Final = INOTIFY_FILESYSTEMS | {"bcachefs", "exfat", "fuseblk", "jfs", "ntfs3", "vfat"}


def examine(here: Installation, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Examine the file, its directory and its filesystem. Blocks."""
    database = Path(here.database)
    file, real = place(database), Path(os.path.realpath(database))
    blocked = machine.blocked_way(here, "not_permitted", "database", database)
    if blocked or not file.regular or not file.status:
        yield blocked or _no_file(here, file, real, environ)
        return
    where = str(database) if database == real else f"{database}, which is {real}"
    if file.status.st_size:
        yield ok("database", f"{where}, {size(file.status.st_size)}")
    else:
        yield here.finding("empty_database", where=where)
    # What SQLite does, it does where a link leads.
    there = here._replace(database=str(real))
    directory, space = place(real.parent), os.statvfs(real.parent)
    sides = [side for side in (place(Path(f"{real}{s}")) for s in SIDES) if side.status]
    if space.f_flag & os.ST_RDONLY:
        yield there.finding("read_only")
    else:
        yield _judge_permissions(there, file, directory, sides)
        yield from judge_owner(there, file, directory, sides, os.geteuid(), os.getegid())
    if any(Path(mount.mount_point) == real for mount in mount_table()):
        yield there.finding("single_file", path=real)
    yield from judge_filesystem(there, mount_of(real.parent))
    yield machine.judge_space(there, space)


def _no_file(here: Installation, file: Place, real: Path, environ: Mapping[str, str]) -> Finding:
    """Say what is at the database's path instead of a file, and where it may be."""
    path, error = file.path, file.error
    if error is None:
        kind = "is a directory" if file.directory else "is no regular file"
        return here.finding("not_a_file", f"{path} {kind}")
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        text = f"{path} cannot be reached: {error.strerror}"
        remedy = "repair the path, or the filesystem that it is on"
        return here.finding("disk_error", text, remedy=remedy)
    text = f"{path} does not exist"
    if path != real:
        text += f" (a link on the way leads to {real})"
    near: list[str] = []
    with contextlib.suppress(OSError):
        near = os.listdir(real.parent)
    if not near:
        text += f", and {real.parent} is missing or empty: is a volume not mounted?"
    hints = [f"there is {real.parent / name}" for name in near if name.endswith(".db")][:5]
    if (named := environ.get(DATABASE_VARIABLE)) and Path(os.path.abspath(named)) != path:
        hints.append(f"{DATABASE_VARIABLE} says {named}")
    remedy = "set database (--database, MBCAP_WATCH_DATABASE, DB_PATH) to CoreScope's file; "
    remedy += "; ".join(hints) or "or start its ingestor, which creates it"
    return here.finding("database_missing", text, remedy=remedy)


def _judge_permissions(
    here: Installation,
    file: Place,
    directory: Place,
    sides: Iterable[Place],
) -> Finding:
    uid, owner = os.geteuid(), file.status.st_uid if file.status else 0
    shut = [each for each in (file, *sides) if not (each.readable and each.writable)]
    refused = [f"may not {'write' if each.readable else 'read'} {each.shown}" for each in shut]
    if not (directory.writable and directory.searchable):
        shut.append(directory)
        refused.append(f"may not create -wal and -shm in {directory.shown}")
    if not refused:
        return ok("permissions", f"user {uid} may write the database and its directory")
    names = " ".join(quote(each.path) for each in shut)
    remedy = f"as root: chown {uid} {names}; chmod u+rwX {names}"
    if uid != owner:
        remedy = f"run mbcap-watch as the database's owner, user {owner} (User= in the unit, user:"
        remedy += " in compose), or give this user the rights by a common group"
    remedy = machine.beyond_mode(shut, os.R_OK | os.W_OK) or remedy
    return here.finding("not_permitted", f"user {uid} {'; '.join(refused)}", remedy=remedy)


def judge_owner(
    here: Installation,
    file: Place,
    directory: Place,
    sides: Iterable[Place],
    uid: int,
    gid: int,
) -> Iterator[Finding]:
    """Judge whether the files that SQLite creates beside the database lock its owner out.

    They get the database's mode, and from root also its owner (`findCreateFileMode` and
    `robustFchown` in SQLite's os_unix.c).
    """
    assert file.status
    owner, group, mode = file.status.st_uid, file.status.st_gid, file.status.st_mode
    out = [s for s in sides if s.status and not machine.mode_of(s.status, owner, [group]) & os.W_OK]
    if owner and out:
        paths, files = ", ".join(s.shown for s in out), " ".join(quote(s.path) for s in out)
        yield here.finding("locked_out", path=paths, file=files, owner=owner, group=group)
    if directory.status and directory.status.st_mode & stat.S_ISGID:
        gid = directory.status.st_gid
    shared = mode & stat.S_IWOTH or (mode & stat.S_IWGRP and gid == group)
    if uid not in (0, owner) and not shared:
        yield here.finding("foreign_owner", owner=owner, uid=uid)


def judge_filesystem(here: Installation, mount: Mount) -> Iterator[Finding]:
    """Judge whether SQLite's locks and shared memory work (sqlite.org/wal.html, "Overview", 6)."""
    where = f"the database is on {mount.type} ({mount.mount_point})"
    if machine.is_remote(mount):
        yield here.finding("network_filesystem", where=where)
    elif mount.type in _LOCAL:
        yield ok("filesystem", where)
    elif mount != UNKNOWN:  # else `no_proc` says why
        yield here.finding("unknown_filesystem", where=where)


def examine_contents(
    here: Installation, settings: Settings, values: Mapping[str, Value]
) -> Iterator[Finding]:
    """Compare the database with what the snapshot wants written; judge its locks. Blocks.

    `values` are those of the snapshot, by public key; there are none if it is of no use.
    """
    real = Path(os.path.realpath(settings.database))
    file = place(real)
    if not file.regular or not file.readable or not os.path.getsize(real):
        return  # `examine` has reported it
    wal = is_wal_database(real)
    if wal and HAS_RESET_BUG:
        yield here.finding("wal_reset_bug", version=sqlite3.sqlite_version)
    lock, rows = machine.judge_lock(here, real, wal=wal), list[Finding]()
    # A database that nobody has open is read again if somebody opens it meanwhile: a daemon does.
    for _ in range(_TRIES if lock.severity == "ok" else 1):
        rows = list(_read(here, settings, dict(values), wal=wal))
        if all(each.code != "busy" for each in rows):
            break
    yield from (lock, *rows)
    release(settings.database)
    log = place(Path(f"{real}-wal"))
    if log.status and log.status.st_size > _LARGE_WAL:
        who = machine.holder({Path(f"{real}-shm"): machine.WAL_READERS}, fcntl.F_WRLCK)
        why = f"; {who} keeps a transaction open, which keeps it from being emptied" if who else ""
        yield here.finding("wal_grows", wal=log.path, size=size(log.status.st_size), why=why)


def _read(
    here: Installation, settings: Settings, values: dict[str, Value], *, wal: bool
) -> Iterator[Finding]:
    tally, names, counts = Tally(), [""], dict[str, int]()
    try:
        with open_to_read(settings.database, settings.wal_grace, BUSY_SECONDS) as access:
            connection = access.connection
            if access.found is Wal.LEFT_BEHIND:
                yield here.finding("wal_unrecovered")

            def fetch(sql: str) -> list[Any]:
                return [value for (value, *_) in connection.execute(sql).fetchall()]

            names = fetch("SELECT lower(name) FROM sqlite_master WHERE type = 'table'")
            if wal:
                yield ok("journal mode", "WAL")
            else:
                yield here.finding("not_wal", mode=fetch("PRAGMA journal_mode")[0])
            for table in sorted(set(TABLES).intersection(names)):
                [counts[table]] = fetch(f"SELECT count(*) FROM {table}")
                if (verdict := fetch(f"PRAGMA quick_check({table})")[0]) != "ok":
                    text = f"{table} is damaged: {printable(verdict, QUOTED)}"
                    yield here.finding("corrupt", text)
            yield from _judge_triggers(here, connection)
            steps = reconcile(
                settings.database,
                values,
                tally,
                batch_rows=settings.batch_rows,
                downgrade=settings.downgrade,
            )
            preview_steps(steps, connection)
    except errors.SchemaMissing as exc:
        there = printable(", ".join(names[:8]), QUOTED) or "no table at all"
        yield here.finding("schema_missing", f"{exc.problem}; there is {there}")
        return
    except errors.DatabaseError as exc:
        yield _unusable(here, exc)
        return
    yield _judge_tables(here, tally, counts)
    if values and "nodes" in tally.served:
        yield _judge_preview(here, tally, len(values), sum(counts.values()))


def _unusable(here: Installation, error: errors.DatabaseError) -> Finding:
    """Return why the database cannot be read."""
    primary = getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF
    if not os.path.isdir("/proc/self"):
        return here.finding("no_proc")
    if primary == sqlite3.SQLITE_READONLY:
        return here.finding("half_written")
    code = "busy" if isinstance(error, errors.DatabaseBusy) else error.cause or "failed"
    subject, remedy = "wal" if isinstance(error, errors.ForeignWal) else "tables", ""
    if code in ("busy", "failed"):  # in the catalogue, these two say to run `check`
        remedy = "check again as root, and as the user of the service; see dmesg"
    return here.finding(code, error.what, subject=subject, remedy=remedy)


# In SQL's syntax, what a trigger waits for stands before the first ON.
_ON_UPDATE: Final = re.compile(r"^\s*CREATE(?:(?!\bON\b).)*\bUPDATE\b", re.IGNORECASE | re.DOTALL)


def _judge_triggers(here: Installation, connection: sqlite3.Connection) -> Iterator[Finding]:
    """Name what may refuse, or change, what is written. CoreScope's own schema has none."""
    sql = "SELECT name, tbl_name, sql FROM sqlite_master WHERE type = 'trigger'"
    for name, table, text in connection.execute(sql).fetchall():
        if table.lower() in TABLES and _ON_UPDATE.search(text):
            yield here.finding("trigger", trigger=printable(name, QUOTED), table=table)


def _judge_tables(here: Installation, tally: Tally, counts: dict[str, int]) -> Finding:
    tables = (f"{table} with {counted(count, 'row', 'rows')}" for table, count in counts.items())
    text = ", ".join(tables)
    if tally.waiting is None:
        return ok("tables", f"{text}, with all columns")
    code = "table_waits" if "nodes" in tally.served else "nodes_not_served"
    return here.finding(code, f"{tally.waiting}; there is {text}")


def _judge_preview(here: Installation, tally: Tally, wanted: int, rows: int) -> Finding:
    """Judge what applying the snapshot would do."""
    changes, unmatched = tally.changed.total(), tally.unmatched
    text = f"{counted(changes, 'row', 'rows')} would change"
    text += f"; of {counted(wanted, 'key', 'keys')} {unmatched:,} are in no table"
    if unmatched == wanted:
        none = "" if rows else ", which has no rows"
        text = f"not one of the {wanted:,} keys of the snapshot is in the database{none}"
        return here.finding("no_match", text)
    if unmatched * 2 > wanted:
        return here.finding("many_unmatched", text)
    return ok("preview", text)
