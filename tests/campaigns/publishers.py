"""Careless publishers share one temporary name: the last valid content arrives, torn content never.

A publisher truncates the temporary file, fills it and renames it, as CoreScope does. Several take
their steps in an order that is drawn by lot, so that one renames what another still fills, a rename
fails, and the file is repaired by late writes into the same inode, which no rename tells of. Others
die half-way, write in place, or truncate.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from campaigns.campaign import Campaign
from processes import daemon
from support import connect, make_database, wait_until

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator
    from pathlib import Path

TABLES: Final = ("nodes", "inactive_nodes")
KEYS: Final = [f"{number:016x}" for number in range(30)]
VALUES: Final = {"confirmed": 2, "suspected": 1}
PAUSES: Final = (0.0, 0.0, 0.0, 0.001, 0.005, 0.02, 0.06)

# A database that tells of every row that is written.
LOGGED: Final = """
CREATE TABLE written (key TEXT, sup INTEGER, evidence TEXT);
CREATE TRIGGER of_nodes AFTER UPDATE ON nodes BEGIN INSERT INTO written
  VALUES (NEW.public_key, NEW.multibyte_sup, NEW.multibyte_evidence); END;
CREATE TRIGGER of_inactive_nodes AFTER UPDATE ON inactive_nodes BEGIN INSERT INTO written
  VALUES (NEW.public_key, NEW.multibyte_sup, NEW.multibyte_evidence); END;
"""

Value = tuple[str, int, str]


def wanted_by(content: bytes) -> set[Value] | None:
    """Return the values that a content wants in the rows that there are; None if it is not valid.

    One that was put together from two may be valid by accident, with a key that nobody has.
    """
    try:
        found: dict[str, Any] = json.loads(content)
    except ValueError:
        return None
    last = {
        entry["public_key"]: (VALUES[entry["status"]], entry.get("evidence", ""))
        for entry in found.get("entries", ())
        if entry.get("status") in VALUES and entry.get("public_key") in KEYS
    }
    return {(key, *value) for key, value in last.items()}


class Files:
    """The directory of the snapshot, the steps of those who write there, and what they left."""

    def __init__(self, directory: Path, dice: random.Random) -> None:
        self.final = directory / "snapshot.json"
        self.temporary = directory / "snapshot.json.tmp"
        self.dice = dice
        self.tally = Counter[str]()
        self.allowed = set[Value]()
        self.documents: list[bytes] = []
        self.steps: list[str] = []
        self.last: tuple[int, bytes] | None = None  # the inode and the content of the file
        self.renamed = True  # whether the last change of the content was a rename

    @property
    def content(self) -> bytes:
        return self.last[1] if self.last else b""

    def look(self) -> None:
        """Take note of the content at this moment."""
        with contextlib.suppress(FileNotFoundError), open(self.final, "rb") as file:
            now = os.fstat(file.fileno()).st_ino, file.read()
            if now == self.last:
                return
            self.renamed, self.last = self.last is None or self.last[0] != now[0], now
            values = wanted_by(now[1])
            self.tally["torn contents"] += values is None
            self.allowed |= values or set()

    def go(self, writers: dict[str, Iterator[str]]) -> None:
        """Have all writers take their steps, to the end of the last one."""
        while writers:
            name = self.dice.choice(list(writers))
            for _ in range(self.dice.choice([1, 1, 1, 2, 5, 100])):
                step = next(writers[name], None)
                self.look()
                if step is None:
                    del writers[name]
                    break
                self.steps.append(f"{name} {step}")
            time.sleep(self.dice.choice(PAUSES))

    def document(self, evidence: str) -> bytes:
        """Return a content of less than a page; in each, the entries are at other places."""
        dice = self.dice
        if not self.documents or dice.random() < 0.85:
            keys = dice.sample(KEYS, dice.randint(20, len(KEYS)))
            status = [*VALUES, "unknown"]
            entries = [
                {"public_key": key, "status": dice.choice(status), "evidence": evidence}
                for key in keys
            ]
            made = json.dumps({"pad": "x" * dice.randrange(500), "entries": entries})
            self.documents.append(made.encode())
            return self.documents[-1]
        return dice.choice(self.documents)

    # The writers: each yields after a step, and says which it was.

    def publish(self, data: bytes) -> Iterator[str]:
        """As Go's os.WriteFile and os.Rename."""
        yield from self.write(self.temporary, data)
        yield self.rename()

    def publish_too_soon(self, data: bytes) -> Iterator[str]:
        """Rename the file before all is written into it."""
        for number, step in enumerate(self.write(self.temporary, data)):
            yield step
            if number == 1:
                yield self.rename()

    def write_in_place(self, data: bytes) -> Iterator[str]:
        return self.write(self.final, data)

    def die(self, data: bytes) -> Iterator[str]:
        return itertools.islice(self.publish(data), self.dice.randint(1, 4))

    def truncate(self, data: bytes) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError):
            os.truncate(self.final, size := self.dice.randrange(len(data)))
            yield f"truncates to {size}"

    def write(self, path: Path, data: bytes) -> Iterator[str]:
        with open(path, "wb", buffering=0) as file:
            yield f"opens {path.name}"
            ends = sorted(self.dice.sample(range(1, len(data)), self.dice.randint(0, 4)))
            for start, end in itertools.pairwise([0, *ends, len(data)]):
                file.write(data[start:end])
                yield f"writes {start} to {end}"
        yield "closes"

    def rename(self) -> str:
        try:
            os.replace(self.temporary, self.final)
        except FileNotFoundError:
            self.tally["renames that failed"] += 1
            return "cannot rename"
        return "renames"


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    dice = random.Random(number)
    database = make_database(
        base / "meshcore.db",
        [
            (table, key, 0, None)
            for place, key in enumerate(KEYS)
            for table in ([TABLES[0]], [TABLES[1]], TABLES)[place % 3]
        ],
    )
    (directory := base / "mbcap-snapshot").mkdir()
    files, tally = Files(directory, dice), Counter[str]()
    mode = ("inotify", "inotify", "poll")[number % 3]
    options = [
        f"--mode={mode}",
        f"--poll-interval={dice.choice(['50ms', '250ms', '1s'])}",
        f"--sweep-interval={dice.choice(['250ms', '250ms', '1s', '5s'])}",
        f"--debounce={dice.choice(['0s', '20ms', '100ms'])}",
        "--resync=24h",
    ]
    with connect(database) as connection:
        connection.executescript(LOGGED)
        with daemon(database, *options) as process:
            for burst in range(min(wanted, 20)):
                final = play_burst(files, f"{burst}")
                try:
                    wait_until(partial(has, connection, final))
                except AssertionError as exc:
                    lost = (options, files.steps, files.content, process.lines, process.said)
                    raise AssertionError("a final was lost", *lost) from exc
                require_allowed(connection, files)
                tally["finals"] += 1
                tally[f"finals with {mode}"] += 1
                tally["finals without a rename"] += not files.renamed
            assert process.end(signal.SIGTERM) == 0, process.said
            assert "Traceback" not in process.said, process.said
        require_allowed(connection, files)
    return tally + files.tally


def play_burst(files: Files, name: str) -> set[Value]:
    """Have several write at once; return what the last content, which is valid, wants."""
    dice, kinds = files.dice, [files.publish] * 5
    kinds += [files.publish_too_soon] * 2 + [files.die] * 2 + [files.write_in_place, files.truncate]
    writers: dict[str, Iterator[str]] = {}
    files.steps = []

    def add(kind: Callable[[bytes], Iterator[str]]) -> None:
        tag = f"{name}.{len(writers)}"
        writers[f"{tag} ({kind.__name__})"] = kind(files.document(tag))

    for _ in range(dice.randint(2, 5)):
        add(dice.choice(kinds))
    files.go(writers)
    if not wanted_by(files.content):
        files.tally["finals that needed a repair"] += 1
        name += ".repair"
        add(dice.choice([files.publish, files.publish_too_soon, files.write_in_place]))
        files.go(writers)
    final = wanted_by(files.content)
    assert final, (files.steps, files.content)
    return final


def has(connection: sqlite3.Connection, final: set[Value]) -> bool:
    """Whether these, and for their keys no others, are the values in the database."""
    keys = {key for key, *_ in final}
    sql = "SELECT public_key, multibyte_sup, multibyte_evidence FROM {}"
    rows = {row for table in TABLES for row in connection.execute(sql.format(table))}
    return {row for row in rows if row[0] in keys} == final


def require_allowed(connection: sqlite3.Connection, files: Files) -> None:
    """Every row that was written had its value from a content that was valid."""
    torn = set(connection.execute("SELECT * FROM written")) - files.allowed
    assert not torn, ("torn content was written", torn, files.steps)


CAMPAIGN = Campaign(
    about="careless publishers on one temporary name: the last valid content arrives, nothing torn",
    unit="finals",
    full=1_000,
    short=3,
    play=play,
)
