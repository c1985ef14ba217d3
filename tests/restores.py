"""Restoring a backup, in every order: what operators do, as steps, with us beside it or without.

A `Case` says what happens in which order; `play` does it, with real processes, and returns how the
restored database is afterwards. Played with `ours="none"` it is the control: the same steps without
us. `require_no_harm` compares both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mbcap_watch import ensure_snapshot_dir, snapshot_path
from processes import apply, neighbour, start_daemon
from support import DEADLINE, connect, document, make_database, put, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from processes import Process

Ours = Literal["none", "host", "apply", "dry_run", "daemon", "embedded"]
"""What of ours runs. `host` is the control of `embedded`: the host without its bridge."""

CLOCKS = {"sweep_interval": "50ms", "resync": "100ms", "poll_interval": "50ms", "debounce": "0"}
KEYS = [f"{number:04x}" for number in range(40)]
UNTOUCHED = (0, None)
LIVE_PACKETS = 300
BACKUP_PACKETS = {"smaller": 120, "larger": 500, "current": 120}

# What a bridge that has nothing to say is given to do harm in. It says something at each resync.
SILENCE = 5.0

# What one that cannot be well is given.
SETTLING = 5.0


@dataclasses.dataclass(frozen=True)
class Case:
    """An order of steps.

    Attributes:
        ingestor: what it does before the backup is put in place: goes on (`live`), is `stopped`,
            is `killed` (and leaves its `-wal`).
        put: how the backup is put in place.
        ours: what of ours runs.
        snapshot: when a new snapshot arrives: `before` the backup is put in place, `after`, `no`.
        server: a read-only server that has the database open: `no`, it stops `first` (after the
            ingestor, before the backup is put in place), or `last` (after all others).
        tail: what the operator does then: `nothing`; `restart` the ingestor; `tidy`: stop it,
            remove `-wal` and `-shm`, start it; `killed_tidy`: as `tidy`, but a live one is killed.
        backup: `smaller` than the database, `larger`, or `current`: it has the snapshot's values.

    """

    ingestor: Literal["live", "stopped", "killed"]
    put: Literal["mv", "cp"]
    ours: Ours
    snapshot: Literal["no", "before", "after"]
    server: Literal["no", "first", "last"]
    tail: Literal["nothing", "restart", "tidy", "killed_tidy"]
    backup: Literal["smaller", "larger", "current"] = "smaller"

    def __str__(self) -> str:
        return "-".join(dataclasses.astuple(self))

    @property
    def control(self) -> Case:
        ours: Ours = "host" if self.ours == "embedded" else "none"
        return dataclasses.replace(self, ours=ours, snapshot="no")

    @property
    def values(self) -> set[tuple[int, str | None]]:
        """What the nodes should have once the ingestor was started on the restored database."""
        if self.ours in ("apply", "daemon", "embedded"):
            return {(2, "first" if self.snapshot == "no" else "second")}
        return {(2, "first") if self.backup == "current" else UNTOUCHED}


class Restored(NamedTuple):
    """How the database is afterwards.

    Attributes:
        integrity: `ok`, or what SQLite says.
        foreign: whether anything of the file before is in it.
        backup: whether all of the backup is in it.
        after: whether all is in it that the ingestor has committed since.
        served: whether the ingestor, started again, could write.
        values: what the nodes have, without repetition.
    """

    integrity: str
    foreign: bool
    backup: bool
    after: bool
    served: bool
    values: frozenset[tuple[int, str | None]]

    @property
    def whole(self) -> bool:
        return self[:4] == ("ok", False, True, True)


def make_packets(path: Path, generation: str, packets: int) -> Path:
    """Make a database whose every row tells which file it comes from."""
    make_database(path, [("nodes", key, 0, None) for key in KEYS])
    with connect(path) as connection:
        connection.execute("UPDATE nodes SET name = ?", (generation,))
        connection.execute(
            "CREATE TABLE packets (id INTEGER PRIMARY KEY, generation TEXT, payload BLOB)"
        )
        connection.execute("CREATE INDEX by_payload ON packets (payload)")
        connection.execute("BEGIN")
        for _ in range(packets):
            connection.execute(
                "INSERT INTO packets (generation, payload) VALUES (?, randomblob(300))",
                (generation,),
            )
        connection.execute("COMMIT")
    return path


def remove_wal(database: Path) -> None:
    for suffix in ("-wal", "-shm"):
        Path(f"{database}{suffix}").unlink(missing_ok=True)


def snapshot(evidence: str) -> bytes:
    return document(*((key, "confirmed", evidence) for key in KEYS))


class Scene:
    """A database with its neighbours, and the steps of which an order is made."""

    def __init__(self, base: Path, case: Case) -> None:
        self.case = case
        self.base = base
        self.backup = make_packets(base / "backup.db", "backup", BACKUP_PACKETS[case.backup])
        if case.backup == "current":
            with connect(self.backup) as connection:
                connection.execute("UPDATE nodes SET multibyte_sup=2, multibyte_evidence='first'")
        self.database = make_packets(base / "meshcore.db", "live", LIVE_PACKETS)
        ensure_snapshot_dir(self.database)
        self.results: list[dict[str, Any]] = []
        self.committed = 0
        self.ingestor: Process | None = None
        self.server: Process | None = None
        self.running: Process | None = None  # the daemon, or the host

    # What the operator does

    def start_ingestor(self, generation: str) -> None:
        self.ingestor = neighbour("ingestor", self.database, generation)

    def stop_ingestor(self) -> None:
        if self.ingestor is not None:
            self.ingestor.end()
            self.committed = int(self.ingestor.lines[-1])
            self.ingestor = None

    def kill_ingestor(self) -> None:
        if self.ingestor is not None:
            self.ingestor.end(signal.SIGKILL)
            self.ingestor = None

    def put_backup(self) -> None:
        if self.case.put == "cp":
            shutil.copyfile(self.backup, self.database)
        else:
            shutil.copyfile(self.backup, copy := self.backup.with_suffix(".copy"))
            os.replace(copy, self.database)

    def start_server(self) -> None:
        self.server = neighbour("server", self.database)

    def stop_server(self) -> None:
        if self.server is not None:
            self.server.end()
            self.server = None

    # What we do

    def publish(self, evidence: str) -> None:
        put(snapshot(evidence), snapshot_path(self.database))

    def start_ours(self) -> None:
        match self.case.ours:
            case "daemon":
                options = [f"--{n.replace('_', '-')}={value}" for n, value in CLOCKS.items()]
                self.running = start_daemon(self.database, *options).ready()
            case "embedded":
                settings = [f"{name}={value}" for name, value in CLOCKS.items()]
                self.running = neighbour("host", self.database, *settings)
            case "host":
                self.running = neighbour("host", self.database)

    def stop_ours(self) -> None:
        if self.running is not None:
            lives = self.case.ours in ("daemon", "embedded", "host")
            assert not (lives and self.running.ended), self.running.said
            asked = self.case.ours in ("embedded", "host")
            self.running.end(None if asked else signal.SIGTERM)
            self.running = None

    def let_ours_sync(self) -> None:
        """Return once ours has looked at the files as they are now."""
        match self.case.ours:
            case "apply" | "dry_run":
                # While it waits, it logs that it does, and the operator goes on.
                if self.running is None:
                    dry = ["--dry-run"] if self.case.ours == "dry_run" else []
                    self.running = apply(self.database, *dry)
                if self.running.ended_or_waits():
                    self.running.end()
                    self.results += self.running.results
                    self.running = None
            case "daemon" | "embedded":
                assert self.running is not None
                lines, known = self.running.lines, len(self.running.lines)
                deadline = time.monotonic() + SILENCE
                # The sync that the next line tells of may have begun before.
                while len(lines) < known + 2 and time.monotonic() < deadline:
                    time.sleep(0.01)
                self.results = [json.loads(line) for line in lines[known:] if line[:1] == "{"]

    def let_ours_settle(self, patience: float) -> None:
        """As `let_ours_sync`, and return only once it has found all well, or `patience` is over."""
        deadline = time.monotonic() + patience
        if self.running is not None and self.case.ours in ("apply", "dry_run"):
            # It began before: its answer may be about files that are gone.
            wait_until(lambda: self.running is None or self.running.ended, "its end")
            self.let_ours_sync()
        self.results = []
        self.let_ours_sync()
        if self.case.ours in ("none", "host"):
            return
        while self.outcome not in ("applied", "unchanged") and time.monotonic() < deadline:
            time.sleep(0.01)
            self.let_ours_sync()

    @property
    def outcome(self) -> str | None:
        return self.results[-1]["outcome"] if self.results else None

    def end(self) -> None:
        for process in (self.ingestor, self.server, self.running):
            if process is not None:
                process.end(signal.SIGKILL)


@contextlib.contextmanager
def scene(base: Path, case: Case) -> Iterator[Scene]:
    base.mkdir(parents=True, exist_ok=True)
    made = Scene(base, case)
    try:
        yield made
    finally:
        made.end()


def play(
    base: Path, case: Case, *, gets_well: bool = False
) -> tuple[Restored, list[dict[str, Any]]]:
    """Restore a backup in the order of `case`; return how it is then, and what we reported.

    Where it `gets_well` in the end, that is waited for.
    """
    with scene(base, case) as at:
        at.start_ingestor("live")
        if case.server != "no":
            at.start_server()
        at.publish("first")
        at.start_ours()
        at.let_ours_sync()
        {"live": lambda: None, "stopped": at.stop_ingestor, "killed": at.kill_ingestor}[
            case.ingestor
        ]()
        if case.snapshot == "before":
            at.publish("second")
        at.let_ours_sync()
        if case.server == "first":
            at.stop_server()
        at.put_backup()
        if case.snapshot == "after":
            at.publish("second")
        at.let_ours_sync()
        at.committed = 0
        if case.tail != "nothing":
            if case.tail == "killed_tidy":
                at.kill_ingestor()
            at.stop_ingestor()
            if case.tail != "restart":
                remove_wal(at.database)
                at.let_ours_sync()
            at.start_ingestor("after")
            at.let_ours_settle(DEADLINE if gets_well else SILENCE)
            at.stop_ingestor()
        after = at.committed
        at.stop_ours()
        at.stop_ingestor()
        at.stop_server()
        return judge(at.database, BACKUP_PACKETS[case.backup], after), at.results


def judge(database: Path, packets: int, after: int) -> Restored:
    """Open the database, as whoever comes next would, and say how it is."""
    try:
        with connect(database) as connection:
            [(integrity,), *_] = connection.execute("PRAGMA integrity_check(1)").fetchall()
            counts = dict(
                connection.execute("SELECT generation, count(*) FROM packets GROUP BY generation")
            )
            names = {name for (name,) in connection.execute("SELECT name FROM nodes")}
            sql = "SELECT DISTINCT multibyte_sup, multibyte_evidence FROM nodes"
            values = frozenset(connection.execute(sql).fetchall())
    except sqlite3.Error as exc:
        return Restored(str(exc), True, False, False, after > 0, frozenset())
    return Restored(
        integrity,
        "live" in counts or "live" in names,
        counts.get("backup") == packets and names == {"backup"},
        counts.get("after", 0) == after,
        after > 0,
        values,
    )


def require_no_harm(base: Path, case: Case, without: Restored) -> Restored:
    """Play `case`: what is well after its control, `without` us, has to be well with us."""
    # A host whose `-shm` was removed while it had the database open cannot go on.
    broken = case.ours == "embedded" and case.put == "cp" and "tidy" in case.tail
    gets_well = without.whole and without.served and not broken
    restored, results = play(base, case, gets_well=gets_well)
    if without.whole:
        assert restored.whole, (f"{case}", without, restored, results)
        assert restored.served or not without.served, (f"{case}", restored, results)
    if gets_well:
        assert restored.values == case.values, (f"{case}", restored, results)
    return restored
