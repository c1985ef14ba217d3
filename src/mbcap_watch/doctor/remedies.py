"""What an operator can do about each finding of `health`, by its code."""

from __future__ import annotations

import os.path
import shlex
from typing import Final


def remedy(code: str, database: str = "", snapshot_dir: str = "", pid: int = 0) -> str:
    """Return what to do about a finding, with commands that can be copied as they are."""
    check = "mbcap-watch check --database {database} --snapshot-dir {snapshot_dir}"
    names = {
        "database": shlex.quote(database),
        "directory": shlex.quote(os.path.dirname(database)),
        "snapshot_dir": shlex.quote(snapshot_dir),
    }
    return REMEDIES[code].format(check=check.format(**names), pid=pid, **names)


REMEDIES: Final = {
    # The process.
    "not_running": "start it (systemctl start mbcap-watch), or ask with the settings that it was"
    " started with (--database, --snapshot-dir, --config, DB_PATH); of one in a container, ask"
    " inside: docker exec CONTAINER mbcap-watch status",
    "other_settings": "if that is the one you mean, ask with its settings; if its path is wrong,"
    " correct --database (or DB_PATH) where it is started",
    "gone": "its log says more (journalctl -u mbcap-watch, docker logs), journalctl -k whether the"
    " kernel was out of memory; then start it again (systemctl start mbcap-watch)",
    "paused": "let it go on: kill -CONT {pid}",
    "stuck": "`{check}` says which filesystem does not answer: bring its server back, or unmount it"
    " (umount -f -l); of a local disk, see dmesg. It goes on by itself once that answers",
    "blocked": "see what it waits for (cat /proc/{pid}/stack, as root; top for the processor); if"
    " that lasts, restart it: nothing is lost by a restart",
    "unasked": "its log says why it could make none; in a container, ask inside: docker exec"
    " CONTAINER mbcap-watch status",
    "not_understood": "if an upgrade was installed meanwhile, restart the running mbcap-watch",
    "starting": "ask again in a moment; a first sync of many rows takes longer",
    "no_sync": "restart it, and report its log; nothing is lost by a restart",
    "two_daemons": "stop all but one (systemctl status, docker ps): with one snapshot they do the"
    " same work twice, with two they undo each other's",
    "no_apply": "allow more than the resync by --max-age; else restart it, and report its log",
    # The snapshot.
    "no_snapshot": "see whether CoreScope's server runs and publishes to this path; in a container,"
    " both must mount the same directory; set --snapshot-dir if it is elsewhere. It is expected"
    " beside the database: `{check}` says whether that is there",
    "snapshot_misplaced": "remove what stands in the way (ls -la), and let the publisher publish",
    "snapshot_unreadable": "let the user of this process read the file and enter every directory"
    " above it (namei -l {snapshot_dir}/snapshot.json); on NFS, see the server's export",
    "malformed": "see who writes the file (python3 -m json.tool shows where it breaks): it must be"
    " filled elsewhere and renamed into place, as mbcap-watch publish does",
    "refused": "put a regular file there (ls -l), or raise --max-bytes if it is that large",
    "old_snapshot": "see whether CoreScope's server runs: nothing is wrong on this side",
    "clocks": "set the clocks of both machines (timedatectl): ages and lags are wrong until then",
    "no_match": "see whether the snapshot and the database belong to the same CoreScope, and set"
    " --snapshot-dir or --database; a database that is new fills by itself",
    "no_inotify": "`{check}`, as the user of this process, says which limit is reached and how to"
    " raise it; until then changes are seen within --poll-interval",
    "sweep_hits": "somebody writes from another machine, or into the file without a rename:"
    " --mode poll notices within --poll-interval",
    # The database.
    "database_missing": "compare --database (or DB_PATH) with the file that CoreScope's ingestor"
    " writes; in a container, both must mount the same directory",
    "no_database": "set --database (or DB_PATH) to the file that CoreScope's ingestor writes: the"
    " snapshot is expected beside it; in a container, both must mount the same directory. If"
    " CoreScope was never started here, start it",
    "schema_missing": "start CoreScope's ingestor in a version that adds the columns: they are"
    " never added here. If there is no such table at all, compare --database (or DB_PATH) with the"
    " file that the ingestor writes",
    "foreign_wal": "`{check}` says whose it is",
    "wal_replaced": "stop what still has the old file open (CoreScope's ingestor); remove the -wal"
    " and -shm beside {database}, which belong to the old file; then start the ingestor",
    "wal_left_behind": "start CoreScope's ingestor, or wait: it goes on by itself. If a backup was"
    " restored, remove the -wal and -shm beside {database} first, which belong to the old file",
    "busy": "`{check}`, as root, names who keeps a transaction open: a backup, VACUUM, an sqlite3"
    " shell, a stuck ingestor; end it, and the snapshot is applied",
    "rows_refused": "see the triggers and constraints of the table (sqlite3 -readonly {database}"
    " .schema); the other rows are written",
    # A database that failed: by what is behind it, as far as that is known.
    "failed": "`{check}`, as the user of this process, examines the database and its disk",
    "disk_full": "make room on that disk (df -h {directory}; df -i: inodes; quota); what waits is"
    " written then",
    "read_only": "mount it read-write (findmnt -T {directory}): no :ro on a volume, ReadWritePaths="
    " in the unit; after a disk error (dmesg), repair the disk first",
    "not_permitted": "run mbcap-watch as the owner of the database (stat {database}; User= in the"
    " unit, user: in compose), or let its user write it, its -wal and -shm and their directory, and"
    " enter every directory above (namei -l {database})",
    "not_a_file": "set --database (or DB_PATH) to the file that CoreScope's ingestor writes. Docker"
    " makes a directory where the source of a bind mount is missing: rmdir it, and mount"
    " CoreScope's data directory",
    "not_a_database": "set --database (or DB_PATH) to the file that CoreScope's ingestor writes; if"
    " it is that one, stop CoreScope and restore a backup",
    "corrupt": "stop CoreScope and mbcap-watch, and restore a backup, or rescue what can be read"
    " (sqlite3 {database} .recover | sqlite3 rescued.db); then look for a failing disk (dmesg)",
    "disk_error": "look for a failing disk (dmesg), and for a filesystem that is not local (findmnt"
    " -T {directory})",
    "limit": "raise the limit of this process: LimitNOFILE=, TasksMax= or MemoryMax= in the unit,"
    " ulimit in a shell, pids_limit or mem_limit in compose",
    "slow_holds": "lower --batch-rows, and see whether the disk is slow or the machine overloaded",
    "contention": "find who keeps transactions open for long (fuser -v {database})",
}
