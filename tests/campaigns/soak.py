"""Hours at a busy site: three renames a second, a busy writer, and what is killed now and then.

One daemon is measured, and lives from the beginning to the end, in the environment of the shipped
unit. Every ten minutes the writer is killed and started again. For a quarter of the time a second
daemon is at the same database, and is killed as well: without it, nobody makes up for what the
first one misses. The two do not know of each other, as in two containers, so that `status` is about
the one that is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from campaigns.campaign import Campaign
from campaigns.measured import Measured
from campaigns.oracle import Oracle
from processes import MBCAP_WATCH, Process
from support import DEADLINE, connect, document, has_open, make_database, put, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

# Seconds. In a shorter soak, what is done every so often is done at least once.
BETWEEN_RENAMES: Final = 1 / 3
BETWEEN_SAMPLES: Final = 10.0
BETWEEN_QUESTIONS: Final = 30.0
BETWEEN_LINES: Final = 60.0
BETWEEN_KILLS: Final = 600.0

# Of so many renames, one is malformed.
ONE_MALFORMED: Final = 15

# The writer empties the `-wal` at 4 MB, unless a reader stays in the way.
MOST_WAL: Final = 32 << 20

# Nodes that stay in `nodes`; nodes that retention moves, and that return.
STILL: Final = [f"{number:064x}" for number in range(150)]
MOVING: Final = [f"{number:064x}" for number in range(1_000, 1_050)]
MARK: Final = STILL[0]

UNIT: Final = Path(__file__).parents[2] / "config" / "mbcap-watch.service"
WRITER: Final = Path(__file__).with_name("writer.py")


class Site:
    """The database, the processes at it, and what has to be in it."""

    def __init__(self, base: Path, dice: random.Random) -> None:
        self.base, self.dice, self.tally = base, dice, Counter[str]()
        rows = [("nodes", key, 0, None) for key in (*STILL, *MOVING)]
        self.database = make_database(base / "meshcore.db", rows)
        with connect(self.database) as connection:
            connection.execute("CREATE TABLE packets (number INTEGER PRIMARY KEY, payload BLOB)")
        self.snapshot = base / "mbcap-snapshot" / "snapshot.json"
        self.oracle = Oracle(self.database)
        self.written_at, self.lags = "", list[float]()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.daemon = self.start_daemon("measured")
        self.twin: Process | None = None
        self.writer = self.start_writer()
        try:
            yield
        finally:
            for process in self.processes():
                process.end(signal.SIGKILL)

    def processes(self) -> list[Process]:
        return [self.daemon, self.writer, *([self.twin] if self.twin else [])]

    def environ(self, name: str) -> dict[str, str]:
        home = self.base / name
        home.mkdir(exist_ok=True)
        given = re.findall(r"^Environment=(\w+)=(.+)$", UNIT.read_text(), re.MULTILINE)
        return os.environ | dict(given) | {"RUNTIME_DIRECTORY": str(home)}

    def start_daemon(self, name: str) -> Process:
        command = [*MBCAP_WATCH, "run", "--json", "--sweep-interval=1s", "--ack"]
        command.append(f"--database={self.database}")
        log = self.base / f"{name}-{self.tally['kills']}.txt"
        return Process(command, log, env=self.environ(name))

    def start_writer(self) -> Process:
        seed = str(self.dice.randrange(10**6))
        command: list[str | Path] = [sys.executable, WRITER, self.database, seed, *MOVING]
        return Process(command, self.base / f"writer-{self.tally['kills']}.txt")

    def kill(self) -> None:
        """Kill the writer and the second daemon at their work, and start the writer again."""
        for process in self.processes()[1:]:
            process.end(signal.SIGKILL)
            self.tally["kills"] += 1
        self.judge_writer()
        self.writer, self.twin = self.start_writer(), None

    def join(self) -> None:
        self.twin = self.twin or self.start_daemon("twin")

    def judge_writer(self) -> None:
        """Each packet that the writer said it had committed is there, without a gap."""
        assert not self.writer.said, self.writer.said
        told = int(self.writer.lines[-1]) if self.writer.lines else 0
        [(count, last)] = self.oracle.read("SELECT count(*), coalesce(max(number), 0) FROM packets")
        assert (count, last >= told) == (last, True), (count, last, told)
        self.tally["writer's transactions"] = count

    def publish(self) -> float:
        """Replace the snapshot by a valid one; return when."""
        self.tally["renames"] += 1
        entries = [(MARK, "confirmed", str(self.tally["renames"]))]
        for key in self.dice.sample(STILL[1:], self.dice.randrange(1, len(STILL))):
            entries.append((key, self.dice.choice(["confirmed", "suspected", "unknown"]), "path"))
        for key in MOVING:
            entries.append((key, self.dice.choice(["confirmed", "suspected"]), "advert"))
        self.written_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        put(document(*entries, written_at=self.written_at), self.snapshot)
        self.oracle.expect(entries)
        return time.monotonic()

    def publish_malformed(self) -> None:
        """Replace it by what is none: the database stays as it is."""
        self.tally["renames"] += 1
        self.tally["malformed"] += 1
        data = self.snapshot.read_bytes()
        kinds = [data[: self.dice.randrange(len(data))], data + b"}", b"\xef\xbb\xbf" + data]
        put(self.dice.choice([*kinds, b"", b"[]", self.dice.randbytes(1_000)]), self.snapshot)

    def rename(self) -> None:
        if self.tally["renames"] % ONE_MALFORMED == 2:
            self.publish_malformed()
            time.sleep(BETWEEN_RENAMES)
            assert not self.oracle.blank(STILL), self.oracle.blank(STILL)
        else:
            self.arrive(self.publish())

    def arrive(self, since: float) -> None:
        """Wait until the database says what the snapshot does; note how long that took."""
        mark = {self.oracle.expected[MARK]}
        wait_until(lambda: self.oracle.values([MARK])[MARK] == mark, f"snapshot {mark}")
        self.lags.append(time.monotonic() - since)
        deadline = time.monotonic() + DEADLINE
        while different := self.oracle.differing():
            assert time.monotonic() < deadline, (different, self.oracle.expected)
            time.sleep(0.02)
        assert not self.oracle.blank(STILL), self.oracle.blank(STILL)

    def ask(self) -> None:
        """Ask `status` until it tells that all is well, with the last snapshot."""
        command = [*MBCAP_WATCH, "status", "--json", f"--database={self.database}"]
        self.arrive(self.publish())
        deadline = time.monotonic() + DEADLINE
        while True:
            done = subprocess.run(
                command, env=self.environ("measured"), stdout=subprocess.PIPE, check=False
            )
            told = json.loads(done.stdout)
            self.tally["questions"] += 1
            assert told["state"] == "running", told
            assert told["stats"]["pid"] == self.daemon.popen.pid, told
            assert (done.returncode == 0) == told["healthy"], told
            said = told["stats"]["snapshot_written_at"]
            if datetime.fromisoformat(said) == datetime.fromisoformat(self.written_at):
                if told["healthy"]:
                    return
                # After a kill, the -wal may have been left behind until the writer is back.
                self.tally.update(f"problem {each['code']}" for each in told["problems"])
            assert time.monotonic() < deadline, told

    def at_rest(self) -> tuple[int, int]:
        """Return how many descriptors and threads it has between two syncs."""
        wal = self.database.with_name(self.database.name + "-wal")
        wait_until(lambda: not has_open(wal, self.measured.pid), "a pause")
        return self.measured.open_things()

    def no_more_than_at_first(self) -> bool:
        return all(now <= then for now, then in zip(self.at_rest(), self.rest, strict=True))

    def tell(self) -> None:
        """Print how far it is: whoever ends it early knows at least that."""
        at, memory = self.measured.samples[-1]
        self.judge_writer()
        counted = sorted((self.tally | self.measured.most).items())
        counts = "; ".join(f"{count:,} {what}" for what, count in counted)
        lags = f"lag {statistics.median(self.lags):.3f} s, {max(self.lags):.3f} s at most"
        sys.stdout.write(
            f"{at:,.0f} s: {memory}, a minute {self.measured.slopes()}; {lags}; {counts}\n"
        )
        sys.stdout.flush()

    def begin(self) -> None:
        self.arrive(self.publish())
        self.daemon.ready()
        wait_until(lambda: self.writer.lines or self.writer.ended, "the writer")
        self.lags.clear()  # its start was in it
        self.measured = Measured(self.daemon.popen.pid)
        self.measured.sample()
        self.rest = self.at_rest()

    def soak(self, wanted: int) -> None:
        """Rename three times a second; what else is due comes in between, and is made up for."""
        cycle = min(BETWEEN_KILLS, wanted / 2)
        every = {
            self.judge: 1.0,
            self.measured.sample: BETWEEN_SAMPLES,
            self.join: cycle,
            self.kill: cycle,
            self.ask: BETWEEN_QUESTIONS,
            self.tell: BETWEEN_LINES,
        }
        # The first kill belongs to the warm-up.
        due = every | {self.join: cycle / 4, self.kill: cycle / 2}
        turn, began = 0, time.monotonic()
        while (at := time.monotonic() - began) < wanted:
            for what in [what for what, when in due.items() if at >= when]:
                what()
                due[what] += every[what]
            self.rename()
            turn += 1
            time.sleep(max(0, began + turn * BETWEEN_RENAMES - time.monotonic()))
        self.tally["seconds"] = int(at)

    def judge(self) -> None:
        """Nobody has ended, and the `-wal` is short."""
        for process in self.processes():
            assert not process.ended, (process.popen.args, process.popen.returncode, process.said)
        size = self.database.with_name(self.database.name + "-wal").stat().st_size
        self.tally |= Counter({"KiB of -wal at most": size // 1024})
        assert size <= MOST_WAL, size

    def end(self) -> None:
        """Nothing is lost, nothing more is open, and both daemons end as they should."""
        if self.twin:
            assert self.twin.ready().end(signal.SIGTERM) == 0, self.twin.said
        self.ask()
        wait_until(self.no_more_than_at_first, f"an end of all but {self.rest}")
        assert self.daemon.end(signal.SIGTERM) == 0, self.daemon.said
        self.writer.end(signal.SIGKILL)
        self.judge_writer()
        # A node that has just returned is nobody's any more.
        assert not self.oracle.differing().keys() - {*MOVING}, self.oracle.differing()
        assert self.oracle.read("PRAGMA integrity_check") == [("ok",)]
        for log in self.base.glob("*.txt"):
            assert "Traceback" not in log.read_text(), log.read_text()


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    site = Site(base, random.Random(number))
    with site.running():
        site.begin()
        site.soak(wanted)
        site.end()
    lags = {"ms of lag, median": statistics.median(site.lags), "ms of lag at most": max(site.lags)}
    site.tally |= Counter({what: round(lag * 1000) for what, lag in lags.items()})
    return site.tally | site.measured.judge()


CAMPAIGN = Campaign(
    about="three renames a second and kills: all arrive, nothing is lost, memory does not grow",
    unit="seconds",
    full=7_200,
    short=1,
    play=play,
)
