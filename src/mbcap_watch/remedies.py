"""What an operator can do about each finding of `health`, by its code."""

from __future__ import annotations

from typing import Final

REMEDIES: Final = {
    # The process.
    "not_running": "start it (systemctl start mbcap-watch), or ask with the settings that it was"
    " started with (--database, --snapshot-dir, --config, DB_PATH); of one in a container, ask"
    " inside: docker exec CONTAINER mbcap-watch status",
    "other_settings": "if that is the one you mean, ask with its settings; if its path is wrong,"
    " correct --database (or DB_PATH) where it is started",
    "stale": "its log says how it ended (journalctl -u mbcap-watch, docker logs); start it again. A"
    " process or container that is paused, or cannot write its stats file, looks like this, too:"
    " the log tells",
    "stuck": "look at the mounts of the snapshot and of the database (ls on both, dmesg); it goes"
    " on by itself once they answer",
    "first_look": "ask again in a moment",
    "no_look": "restart it, and report its log; nothing is lost by a restart",
    "two_daemons": "stop all but one (systemctl status, docker ps): with one snapshot they do the"
    " same work twice, with two they undo each other's",
    "no_apply": "allow more than the resync by --max-age; else restart it, and report its log",
    # The snapshot.
    "no_snapshot": "see whether CoreScope's server runs and publishes to this path; in a container,"
    " both must mount the same directory; set --snapshot-dir if it is elsewhere",
    "snapshot_misplaced": "remove what stands in the way (ls -la), and let the publisher publish",
    "snapshot_unreadable": "let the user of this process read the file and enter every directory"
    " above it (namei -l PATH); on NFS, see whether the mount is still good (ls)",
    "malformed": "see who writes the file (python3 -m json.tool shows where it breaks): it must be"
    " filled elsewhere and renamed into place, as mbcap-watch publish does",
    "refused": "put a regular file there (ls -l), or raise --max-bytes if it is that large",
    "old_snapshot": "see whether CoreScope's server runs: nothing is wrong on this side",
    "clocks": "set the clocks of both machines (timedatectl): ages and lags are wrong until then",
    "sweep_hits": "somebody writes from another machine, or into the file without a rename:"
    " --mode poll notices within --poll-interval",
    # The database.
    "database_missing": "compare --database (or DB_PATH) with the file that CoreScope's ingestor"
    " writes; in a container, both must mount the same directory",
    "schema_missing": "start CoreScope's ingestor in a version that adds the columns: they are"
    " never added here",
    "busy": "find who keeps a transaction open (fuser -v DATABASE): a backup, VACUUM, an sqlite3"
    " shell; it is applied once the lock is free",
    "failed": "if the disk is full, free space (df -h); if it is read-only or not permitted, let"
    " the user of this process write the database, its -wal and -shm and their directory, and look"
    " for a read-only mount (findmnt -T PATH); if it is corrupt, restore a backup",
    "rows_refused": "see the triggers and constraints of the table (sqlite3 DATABASE .schema); the"
    " other rows are written",
    "slow_holds": "lower --batch-rows, and see whether the disk is slow or the machine overloaded",
    "contention": "find who keeps transactions open for long (fuser -v DATABASE)",
}
