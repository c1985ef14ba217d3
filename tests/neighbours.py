"""Other processes at a database: an ingestor, a writer, a server, an idler, a host that embeds us.

Run as a program, `neighbours.py ROLE DATABASE …`. Each prints `ready` once it has the database
open, and ends when its standard input does. As in CoreScope, the ingestor empties its `-wal` when
it is told to stop, and the server reads without a busy timeout and cannot empty anything.
"""

from __future__ import annotations

import contextlib
import json
import select
import sqlite3
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

# Written before the ingestor says that it is ready: its `-wal` then holds every page that matters.
BURST = 40

# Between two packets after that. The `-wal` stays below the size at which others empty it.
PAUSE = 0.05


def main(role: str, database: str, *arguments: str) -> None:
    if role == "ingestor":
        ingest(database, *arguments)
    elif role == "writer":
        write(database, *map(float, arguments))
    elif role == "server":
        serve(database)
    elif role == "idler":
        idle(database)
    else:
        host(database, *arguments)


def told_to_end(seconds: float) -> bool:
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def say(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def ingest(database: str, generation: str) -> None:
    """Write packets until told to stop; say how many were committed."""
    connection = sqlite3.connect(database, timeout=5, isolation_level=None)
    tried = committed = 0
    while not told_to_end(0 if tried < BURST else PAUSE):
        tried += 1
        # The file may have been overwritten under it; the real one logs that and goes on.
        with contextlib.suppress(sqlite3.Error):
            if tried == 1:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                # What is in the -wal stays there, so that replaying it always shows.
                connection.execute("PRAGMA wal_autocheckpoint = 0")
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(
                    "INSERT INTO packets (generation, payload) VALUES (?, randomblob(300))",
                    (generation,),
                )
                connection.execute("UPDATE nodes SET last_seen = ?", (str(tried),))
                connection.execute("COMMIT")
                committed += 1
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
        if tried == BURST:
            say("ready")
    with contextlib.suppress(sqlite3.Error):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()
    say(committed)


def write(database: str, hold: float, gap: float, vacuum: float = 0) -> None:
    """Hold the write lock for `hold` seconds, let it go for `gap`, and so on until told to stop.

    With `vacuum`, do so after a VACUUM. Say how many packets were committed, and what went wrong.
    """
    committed, errors = 0, []
    with contextlib.closing(sqlite3.connect(database, timeout=5, isolation_level=None)) as writer:
        say("ready")
        while not told_to_end(gap):
            try:
                if vacuum:
                    writer.execute("VACUUM")
                writer.execute("BEGIN IMMEDIATE")
                writer.execute("INSERT INTO packets (payload) VALUES (randomblob(300))")
                time.sleep(hold)
                writer.execute("COMMIT")
                committed += 1
            except sqlite3.Error as exc:
                errors.append(f"{exc.sqlite_errorname}: {exc}")
                if writer.in_transaction:
                    writer.execute("ROLLBACK")
    say(json.dumps({"committed": committed, "errors": errors}))


def serve(database: str) -> None:
    """Read, with one connection, until told to stop."""
    uri = f"file:{database}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=0)) as connection:
        connection.execute("SELECT count(*) FROM packets").fetchall()
        say("ready")
        while not told_to_end(0.02):
            with contextlib.suppress(sqlite3.Error):
                connection.execute("SELECT count(*) FROM packets").fetchall()


def idle(database: str) -> None:
    """Keep the database open, with frames in the `-wal`, and do nothing."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("INSERT INTO packets (generation) VALUES ('live')")
        # Marks in the -shm what it has read: nobody else needs to, who reads the same.
        connection.execute("SELECT count(*) FROM packets").fetchall()
        say("ready")
        sys.stdin.readline()


def host(database: str, *settings: str) -> None:
    """Read through an aiosqlite connection; with settings, run a bridge beside it.

    At the end, say how many of its reports were dropped.
    """
    import aiosqlite  # noqa: PLC0415 - the others start more quickly without
    import anyio  # noqa: PLC0415

    from mbcap_watch import PersistResult, Settings, WatchState, run  # noqa: PLC0415

    dropped = 0

    def on_result(result: PersistResult) -> None:
        say(result.to_json())

    def on_state(state: WatchState) -> None:
        nonlocal dropped
        dropped = state.reports_dropped

    async def main() -> None:
        async with aiosqlite.connect(database) as connection, anyio.create_task_group() as group:
            await connection.execute_fetchall("SELECT count(*) FROM packets")
            if settings:
                pairs: list[tuple[str, Any]] = [(s, v) for s, _, v in map(partition, settings)]
                made = Settings.from_mapping({"database": Path(database), **dict(pairs)})
                await group.start(partial(run, made, on_result=on_result, on_state=on_state))
            say("ready")
            while not told_to_end(0):
                await anyio.sleep(0.02)
                with contextlib.suppress(sqlite3.Error):
                    await connection.execute_fetchall("SELECT count(*) FROM packets")
            group.cancel_scope.cancel()

    def partition(text: str) -> tuple[str, str, str]:
        return text.partition("=")

    anyio.run(main)
    say(f"dropped {dropped}")


if __name__ == "__main__":
    main(*sys.argv[1:])
