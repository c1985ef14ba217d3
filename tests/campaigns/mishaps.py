"""Sequences of what can happen to the directory, beside running bridges: none is missed.

A round is one process with many bridges. Each has a directory of its own, to which one sequence
after the other happens; all sequences of a round happen at the same time.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import shutil
import sqlite3
import sys
import time
from collections import Counter
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Final

import anyio

from campaigns.campaign import HERE, Campaign
from campaigns.trouble import TROUBLES, mode_of
from processes import Process, running
from support import document, make_database, put, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from campaigns.trouble import Trouble

BRIDGES: Final = 16
SEQUENCES: Final = 5  # for each bridge, in one round
STEPS: Final = 10
SWEEP: Final = 0.05

# What happens in a round, beside the sequences.
KINDS: Final = (
    *("inotify", "bindfs", "poll", "sshfs", "overflow", "inotify", "bindfs mounted anew"),
    *("watches", "sshfs", "instances", "descriptors", "sshfs mounted anew"),
)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Place:
    """A directory of a snapshot, what is done to it, and the database that it is for."""

    def __init__(self, base: Path, database: Path, kind: str, dice: random.Random) -> None:
        base.mkdir()
        self.directory = base / "mbcap-snapshot"
        self.file = self.directory / "snapshot.json"
        self.away, self.other = base / "away", base / "other"
        self.database = make_database(database, [("nodes", "aa11", 0, None)])
        self.dice = dice
        # sftp-server may open a FIFO as the file that was there, and answers nobody from then on.
        left_out = {Place.fifo_for_file} if kind.startswith("sshfs") else set()
        self.mishaps = [each for each in MISHAPS if each not in left_out]
        self.done: list[str] = []
        self._numbers = itertools.count()

    def content(self) -> bytes:
        self.last = f"e{next(self._numbers)}"
        return document(("aa11", "confirmed", self.last))

    def arrived(self, judge: sqlite3.Connection) -> bool:
        """Whether the last snapshot is in the database, and nothing else is."""
        rows = judge.execute("SELECT public_key, multibyte_sup, multibyte_evidence FROM nodes")
        return rows.fetchall() == [("aa11", 2, self.last)]

    def suffer_once(self) -> None:
        mishap = self.dice.choice(self.mishaps)
        self.done.append(mishap.__name__)
        mishap(self)

    def publish(self) -> None:
        if self.directory.is_dir() and not self.file.is_dir():
            put(self.content(), self.file)

    def write_in_place(self) -> None:
        if self.directory.is_dir() and not self.file.exists():
            self.file.unlink(missing_ok=True)
            self.file.write_bytes(self.content())

    def tear(self) -> None:
        if self.directory.is_dir() and not self.file.is_dir():
            put(self.content()[:30], self.file)

    def repair_in_place(self) -> None:
        """The other publisher's late write: no rename tells of it."""
        if self.file.is_file():
            self.file.write_bytes(self.content())

    def delete_file(self) -> None:
        if self.directory.is_dir():
            remove(self.file)

    def delete_directory(self) -> None:
        remove(self.directory)

    def make_directory(self) -> None:
        if not self.directory.is_dir():
            remove(self.directory)
            self.directory.mkdir()

    def move_away(self) -> None:
        if os.path.lexists(self.directory):
            remove(self.away)
            self.directory.rename(self.away)

    def move_back(self) -> None:
        if os.path.lexists(self.away):
            remove(self.directory)
            self.away.rename(self.directory)

    def turn_link(self) -> None:
        remove(self.directory)
        self.other.mkdir(exist_ok=True)
        self.directory.symlink_to("other")

    def file_for_directory(self) -> None:
        remove(self.directory)
        self.directory.write_bytes(b"")

    def fifo_for_file(self) -> None:
        if self.directory.is_dir():
            remove(self.file)
            os.mkfifo(self.file)

    def directory_for_file(self) -> None:
        if self.directory.is_dir():
            remove(self.file)
            self.file.mkdir()

    def dangling_link_for_file(self) -> None:
        if self.directory.is_dir():
            remove(self.file)
            self.file.symlink_to("nowhere")

    def lock_up(self) -> None:
        """Rights that keep out whoever is not root, and then others."""
        if self.directory.is_dir() and not self.directory.is_symlink():
            self.directory.chmod(self.dice.choice((0, 0o755)))

    def publish_at_last(self) -> None:
        """Publish as a server does that finds the directory in any of these states."""
        self.make_directory()
        self.directory.chmod(0o755)
        if self.file.is_dir():
            self.file.rmdir()
        put(self.content(), self.file)


MISHAPS: list[Callable[[Place], None]] = [
    Place.publish,
    Place.write_in_place,
    Place.tear,
    Place.repair_in_place,
    Place.delete_file,
    Place.delete_directory,
    Place.make_directory,
    Place.move_away,
    Place.move_back,
    Place.turn_link,
    Place.file_for_directory,
    Place.fifo_for_file,
    Place.directory_for_file,
    Place.dangling_link_for_file,
    Place.lock_up,
]


async def suffer(
    kind: str,
    host: Process,
    places: list[Place],
    trouble: Trouble,
    tally: Counter[str],
    sequences: int,
) -> None:
    """Have sequences happen to all places at once, one after the other to each."""
    with ExitStack() as stack:
        judges = [
            stack.enter_context(closing(sqlite3.connect(place.database, timeout=30)))
            for place in places
        ]

        async def arrival(place: Place, judge: sqlite3.Connection) -> None:
            started = time.monotonic()
            what = f"the last snapshot of {place.database.name}, {place.done}"
            await until(lambda: place.arrived(judge) or host.ended, what)
            assert not host.ended, host.said
            took = time.monotonic() - started
            bound = next((each for each in (0.2, 1, 5, 10, 30) if took <= each), 60)
            tally[f"arrived within {bound} s"] += 1

        async def sequence(place: Place, judge: sqlite3.Connection) -> None:
            place.done.clear()
            for _ in range(STEPS):
                place.suffer_once()
                await anyio.sleep(place.dice.choice((0, 0, 0.001, 0.02, SWEEP)))
            place.publish_at_last()
            await arrival(place, judge)
            tally["sequences"] += 1

        every = range(len(places))
        await until(lambda: host.ended or all(mode_of(host, n) for n in every), "all bridges")
        async with anyio.create_task_group() as beside:
            beside.start_soon(trouble.go_on, host)
            for _ in range(sequences):
                async with anyio.create_task_group() as group:
                    for each in zip(places, judges, strict=True):
                        group.start_soon(sequence, *each)
                if await trouble.then(host, places):
                    for each in zip(places, judges, strict=True):
                        await arrival(*each)
            beside.cancel_scope.cancel()
    if kind != "poll" and trouble.near == trouble.far:

        def watched() -> bool:
            return all(mode_of(host, n) == "inotify" for n in every) or not instance_is_left()

        await until(watched, "the watches")


def instance_is_left() -> bool:
    """Whether this user has an inotify instance left; others who run here may use up all."""
    instance = ctypes.CDLL(None).inotify_init()
    if instance >= 0:
        os.close(instance)
    return bool(instance >= 0)


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    kind, dice, tally = KINDS[number % len(KINDS)], random.Random(number), Counter[str]()
    count = min(BRIDGES, wanted)
    with ExitStack() as stack:
        trouble = stack.enter_context(TROUBLES[kind](base, dice, tally))
        places = [
            Place(trouble.far / f"{n}", base / f"{n}.db", kind, random.Random(dice.random()))
            for n in range(count)
        ]
        for place in places:  # bridges find it so when they start
            for _ in range(dice.randrange(4)):
                place.suffer_once()
        given = [
            {
                "database": f"{place.database}",
                "snapshot_dir": f"{trouble.near}/{n}/mbcap-snapshot",
                "mode": "poll" if kind == "poll" else "auto",
                "poll_interval": "50ms",
                "sweep_interval": SWEEP,
            }
            for n, place in enumerate(places)
        ]
        command = [*trouble.prefix, sys.executable, f"{HERE}/bridges.py", json.dumps(given)]
        host = stack.enter_context(running(Process(command, base / "log.txt")))
        anyio.run(suffer, kind, host, places, trouble, tally, min(SEQUENCES, -(-wanted // count)))
        assert host.end() == 0, host.said
        assert host.lines[-1] == "left {}", (host.lines[-1], host.said)
        assert "Traceback" not in host.said, host.said
    tally[f"on {kind}"] = tally["sequences"]
    return tally


CAMPAIGN = Campaign(
    about="mishaps of the directory, on FUSE and at exhausted limits: the last snapshot arrives",
    unit="sequences",
    full=5_000,
    short=10,
    play=play,
)
