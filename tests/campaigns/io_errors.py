"""Calls to the kernel fail, the disk is full, or read-only: the daemon says so, stays, and heals.

A round is one daemon, and one kind of call on one kind of file, with every errno after the other.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
import sqlite3
import time
from collections import Counter
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from campaigns.campaign import Campaign
from campaigns.disks import Disk
from campaigns.failing_io import FailingIO
from campaigns.io_kinds import KINDS, PLACES, Kind
from processes import MBCAP_WATCH, Process, running
from support import make_database, open_descriptors, put, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds until all is well again: with another publication, and by itself at the next retry, which
# is 5 s after the last failure.
PUBLISHED, BY_ITSELF = 5.0, 6.0

KEYS: Final = [f"{number:064x}" for number in range(300)]


class Bench:
    """A daemon under test, who publishes for it, and who judges it."""

    def __init__(self, base: Path, kind: Kind, stack: ExitStack, dice: random.Random) -> None:
        self.kind, self.dice = kind, dice
        self.failing = FailingIO(base)
        self.run = base / "mbcap-watch"
        self.run.mkdir(mode=0o700)
        self.disk = stack.enter_context(Disk.mounted(base)) if kind.place == "disk" else None
        home = self.disk.far if self.disk else base
        self.near = (self.disk.near if self.disk else base) / "m.db"
        rows = [("inactive_nodes" if n % 5 == 0 else "nodes", key) for n, key in enumerate(KEYS)]
        both = [("inactive_nodes", KEYS[1])]
        self.database = make_database(home / "m.db", [(*row, 0, None) for row in rows + both])
        self.target = base / "mbcap-snapshot" / "snapshot.json"
        self.number = 0
        self.publish()
        if kind.beside:
            self.neighbour = sqlite3.connect(self.database, isolation_level=None, timeout=30)
            stack.enter_context(closing(self.neighbour))
            self.neighbour.execute("SELECT * FROM nodes LIMIT 1").fetchall()
        options = ["--ack", "--busy-deadline=500ms", "--batch-rows=100"]
        files = [f"--database={self.near}", f"--snapshot-dir={self.target.parent}"]
        command = [*MBCAP_WATCH, "run", "--json", *files, *options]
        environ = self.failing.environ | {"RUNTIME_DIRECTORY": f"{self.run}"}
        started = Process(command, base / "daemon.txt", env=environ)
        self.daemon = stack.enter_context(running(started)).ready()
        self.healed()

    def publish(self) -> None:
        """Publish a snapshot that wants every row changed."""
        self.number += 1
        values = [(key, *self.value(n, self.number)) for n, key in enumerate(KEYS)]
        entries = [
            {"public_key": key, "status": status, "evidence": evidence}
            for key, status, _, evidence in values
        ]
        document = {"writtenAt": self.written_at, "entries": entries}
        put(json.dumps(document).encode(), self.target)

    @property
    def written_at(self) -> str:
        return f"2026-01-01T00:00:00.{self.number:09}Z"

    @staticmethod
    def value(key: int, number: int) -> tuple[str, int, str]:
        """Return what snapshot `number` says of a key, and what is to be stored."""
        status, sup = ("confirmed", 2) if (key + number) % 2 else ("suspected", 1)
        return status, sup, f"e{number}"

    # -------------------------------------------------------------------------- the judge

    def wrong(self, connection: sqlite3.Connection, back: int = 0) -> list[tuple[Any, ...]]:
        """Return the rows that are neither as the present snapshot says, nor as `back` before."""
        wanted = {
            key: {self.value(n, self.number - each)[1:] for each in range(back + 1)}
            for n, key in enumerate(KEYS)
        }
        rows = [
            row
            for table in ("nodes", "inactive_nodes")
            for row in connection.execute(
                f"SELECT public_key, multibyte_sup, multibyte_evidence FROM {table}"
            )
        ]
        assert len(rows) == len(KEYS) + 1
        return [row for row in rows if row[1:] not in wanted[row[0]]]

    def said(self) -> bool:
        """Whether the last line says that the present snapshot is in the database."""
        last = self.daemon.results[-1]
        compared = last["outcome"] in ("applied", "unchanged") and last["error"] is None
        return compared and last["written_at"] == self.written_at

    def lives(self) -> bool:
        assert not self.daemon.ended, self.about()
        return True

    def about(self) -> str:
        last = "\n".join(self.daemon.lines[-5:])
        return f"{self.kind}, calls failed: {self.failing.failed}\n{last}\n{self.daemon.said}"

    def healed(self) -> None:
        """Return once the daemon says that the snapshot is in; whoever looks has to see it."""
        what = f"an end of the errors of {self.about()}"
        wait_until(lambda: self.lives() and self.said(), what)
        with ExitStack() as stack:
            if self.kind.beside:
                connection = self.neighbour
            else:
                connection = sqlite3.connect(self.database, isolation_level=None, timeout=30)
                stack.enter_context(closing(connection))
            assert self.wrong(connection) == [], self.about()
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]

    def sockets(self) -> list[Path]:
        """Return where the daemon may be asked: it goes elsewhere if its first choice fails."""
        us = f"mbcap-watch-{os.geteuid()}"
        homes = self.run, *(Path(each, us) for each in ("/dev/shm", "/run", "/tmp"))
        name = f"[0-9a-f]*-{self.daemon.popen.pid}-*.sock"
        return [path for home in homes for path in home.glob(name)]

    def status(self, timeout: float = 10) -> dict[str, Any] | None:
        """Return what the daemon answers on its socket; None if it does not, now."""
        try:
            [path] = self.sockets()
            with socket.socket(socket.AF_UNIX) as asking:
                asking.settimeout(timeout)
                asking.connect(f"{path}")
                parts = iter(partial(asking.recv, 1 << 16), b"")
                found: dict[str, Any] = json.loads(b"".join(parts))
        except (OSError, ValueError):  # it is being made anew
            return None
        return found

    def ask(self) -> None:
        wait_until(lambda: self.lives() and self.status(), "an answer on the control socket")

    # -------------------------------------------------------------------------- a trial

    def trial(self, number: int, tally: Counter[str]) -> tuple[float, float]:
        """Have calls fail with an errno.

        Return how long it took until all was well again, and how long that may take.
        """
        kind, dice, before = self.kind, self.dice, len(self.daemon.results)
        begin, end, reached = self.fault(number)
        begin()
        if kind.place == "socket":
            for path in self.sockets():
                path.unlink()
        if kind.call == "watch":
            self.target.parent.rename(self.run / f"away {self.number}")
            self.target.parent.mkdir()
        self.publish()
        wait_until(lambda: self.lives() and len(self.daemon.results) > before, "an outcome")
        # Some calls are made at the sweep alone, which is each 5 s.
        until = time.monotonic() + (6 if kind.pattern == "each" else 0)
        while time.monotonic() < until and not reached():
            self.lives()
            if kind.place == "listener":
                self.status(0.2)
            time.sleep(0.05)
        time.sleep(dice.choice((0, 0, 0.1, 0.5)))
        last = self.daemon.results[-1]["outcome"]
        tally[f"{last} meanwhile"] += 1
        if kind.beside:
            said = self.said()
            assert self.wrong(self.neighbour, back=0 if said else 1) == [], self.about()
        if kind.place not in ("socket", "listener", "any"):
            self.ask()
        end()
        if not reached():
            pattern = f" by {kind.call} {kind.place}" if kind.pattern == "each" else ""
            tally[f"without effect{pattern}"] += 1
        ended, allowed = time.monotonic(), BY_ITSELF
        if dice.random() < 0.7:
            allowed = PUBLISHED
            self.publish()
        self.healed()
        return time.monotonic() - ended, allowed

    def fault(
        self, number: int
    ) -> tuple[Callable[[], object], Callable[[], object], Callable[[], object]]:
        """Return what begins the fault, what ends it, and what tells whether it was of effect."""
        kind, dice = self.kind, self.dice
        if self.disk is not None:
            return (*self.disk.fault(kind.call, dice.choice((0, 0, 8, 40)) << 10), lambda: True)
        first, every = 0, 1
        if kind.pattern == "some":
            first, every = dice.choice((0, 0, 1, 2, 5)), dice.choice((2, 3, 7, 1 << 30))
        if number == errno.EINTR:
            every = max(every, 2)  # Python and SQLite try again at once
        begin = partial(self.failing.start, kind.call, PLACES[kind.place], number, first, every)
        return begin, self.failing.stop, lambda: self.failing.failed


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    kind, dice, tally = KINDS[number % len(KINDS)], random.Random(number), Counter[str]()
    with ExitStack() as stack:
        bench = Bench(base, kind, stack, dice)
        pid = bench.daemon.popen.pid
        bench.ask()
        descriptors = len(open_descriptors(pid))
        for each in dice.sample(kind.errors, len(kind.errors))[:wanted]:
            # The machine may be busy: what is slow has to be so again.
            for attempt in range(3):
                took, allowed = bench.trial(each, tally)
                bound = next((s for s in (0.5, 1, 2, 5, 6) if took <= s), "more than 6")
                tally[f"healed within {bound} s"] += 1
                if took <= allowed:
                    break
                name = errno.errorcode.get(each, "")
                assert attempt < 2, f"{name} healed after {took:.1f} s: {bench.about()}"
            tally["combinations"] += 1
        bench.ask()
        wait_until(lambda: (bench.status() or {})["watch"]["mode"] == "inotify", "the watch")
        # Those with which it asks for locks may be kept.
        few = descriptors + 2
        wait_until(lambda: len(open_descriptors(pid)) <= few, f"{open_descriptors(pid)}")
        assert bench.daemon.end(signal.SIGTERM) == 0, bench.about()
        assert "Traceback" not in bench.daemon.said, bench.about()
    return tally


CAMPAIGN = Campaign(
    about="an I/O error at every call, full and read-only disks: told, no exit, healed within 5 s",
    unit="combinations",
    full=sum(len(kind.errors) for kind in KINDS),
    short=2,
    play=play,
)
