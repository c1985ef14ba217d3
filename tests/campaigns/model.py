"""A bridge beside another writer: after each sync, the rows are those of a model (`rules`)."""

from __future__ import annotations

import json
import random
import sqlite3
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final

import anyio

from campaigns.campaign import Campaign
from campaigns.rules import TABLES, Model, Rows, Times, Value
from mbcap_watch import snapshot_path
from support import bridge, make_database, put, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mbcap_watch import PersistResult
    from support import Results

KEYS: Final = [f"{number:02x}" * 32 for number in range(12)]
STRANGERS: Final = ["", "é", "00" * 31, "K" * 1025]  # keys of a snapshot, and of no row


class Round:
    """The other writer, the publisher, and what checks the bridge."""

    def __init__(self, base: Path, dice: random.Random) -> None:
        self.dice = dice
        self.settings: dict[str, Any] = {
            "debounce": 0,
            "busy_deadline": 0,
            "mode": dice.choice(["inotify", "inotify", "poll"]),
            "poll_interval": "20ms",
            "sweep_interval": dice.choice(["50ms", "24h"]),
            "resync": dice.choice(["100ms", "24h"]),
            "batch_rows": dice.choice([1, 3, 500]),
            "downgrade": dice.choice(["allow", "never", "hold", "hold"]),
            "downgrade_hold": dice.choice([0.3, 3600]),
        }
        hold = self.settings["downgrade_hold"]
        self.model = Model(self.settings["downgrade"], hold)
        self.is_replaced = False  # whether the snapshot was, since the last sync
        # Then the outcome does not depend on the clock, and the model knows it exactly.
        self.is_timeless = self.model.downgrade != "hold" or hold == 3600
        self.path = make_database(base / "m.db", journal_mode=dice.choice(["wal", "wal", "delete"]))
        self.snapshot = snapshot_path(self.path)
        self.connection = self.connect()
        self.began = time.monotonic()
        self.steps, self.tally = deque[str](maxlen=30), Counter[str]()

    def connect(self) -> sqlite3.Connection:
        """Open the database, and read, so that it is open: the bridge may have left the -wal."""
        connection = sqlite3.connect(self.path, isolation_level=None)
        connection.execute("SELECT count(*) FROM nodes").fetchall()
        return connection

    def note(self, step: str, *about: object) -> None:
        self.steps.append(f"{step} {' '.join(map(str, about))}")
        self.tally["steps"] += 1
        self.tally[step] += 1

    # -------------------------------------------------------------------- the other writer

    def move(self) -> None:
        """Copy a node to the other table, as retention does, and delete it."""
        table, other = self.dice.choice([TABLES, TABLES[::-1]])
        if not self.model.rows[table]:
            return
        key = self.dice.choice(sorted(self.model.rows[table]))
        self.note("move", key[:2], table, other)
        self.model.rows[other][key] = self.model.rows[table].pop(key)
        self.model.touched.add(key)
        self.connection.execute(
            f"INSERT OR REPLACE INTO {other} SELECT * FROM {table} WHERE public_key = ?", (key,)
        )
        self.connection.execute(f"DELETE FROM {table} WHERE public_key = ?", (key,))

    def delete(self) -> None:
        table, key = self.dice.choice(TABLES), self.dice.choice(KEYS)
        self.note("delete", key[:2], table)
        self.model.rows[table].pop(key, None)
        self.model.touched.add(key)
        self.connection.execute(f"DELETE FROM {table} WHERE public_key = ?", (key,))

    def come(self) -> None:
        """Make a new row, without a value; an inactive one of the same node stays."""
        table, key = self.dice.choice([*TABLES, "nodes"]), self.dice.choice(KEYS)
        self.note("come", key[:2], table)
        self.model.rows[table][key] = (0, None)
        self.model.touched.add(key)
        self.connection.execute(f"INSERT OR REPLACE INTO {table} (public_key) VALUES (?)", (key,))

    def set(self) -> None:
        """Give a row another value, as the reference's persister does, or somebody by hand."""
        table, key = self.dice.choice(TABLES), self.dice.choice(KEYS)
        value = self.dice.choice([0, 1, 2, 2, 7]), self.dice.choice([None, "", "advert", "hand"])
        self.note("set", key[:2], table, value)
        if key in self.model.rows[table]:
            self.model.rows[table][key] = value
            self.model.touched.add(key)
        self.connection.execute(
            f"UPDATE {table} SET multibyte_sup = ?, multibyte_evidence = ? WHERE public_key = ?",
            (*value, key),
        )

    def hear(self) -> None:
        """Write another column, as every packet does."""
        self.note("hear")
        self.connection.execute("UPDATE nodes SET last_seen = ?", (str(self.dice.random()),))

    def reconnect(self) -> None:
        """Be away for a moment; then nobody has the database open."""
        self.note("reconnect")
        self.connection.close()
        self.connection = self.connect()

    # -------------------------------------------------------------------- the publisher

    def replace(self, wanted: dict[str, Value] | None) -> None:
        self.model.replace(wanted)
        self.is_replaced = True

    def publish(self) -> None:
        """Replace the snapshot. Its entries are those of a few keys, some without a value."""
        wanted: dict[str, Value] = {}
        entries: list[Any] = []
        statuses = {"confirmed": 2, "suspected": 1, "unknown": None, "Confirmed": None, None: None}
        weights = self.dice.choice([(9, 1, 1, 1, 1), (1, 9, 1, 1, 1), (4, 4, 2, 1, 1)])
        for _ in range(self.dice.randrange(20)):
            key = self.dice.choice([*KEYS, *KEYS, *KEYS, *STRANGERS])
            [status] = self.dice.choices(list(statuses), weights)
            evidence = self.dice.choice([None, "", "advert", "path", "\0😀", "x" * 4097])
            entry = {"public_key": key, "status": status, "evidence": evidence}
            entries.append({name: text for name, text in entry.items() if text is not None})
            sup = statuses[status]
            if sup is not None and len(key) <= 1024 and len(evidence or "") <= 4096:
                wanted[key] = (sup, evidence or "")
        self.note("publish", {key[:2]: value for key, value in wanted.items()})
        self.replace(wanted)
        put(json.dumps({"x": self.dice.random(), "entries": entries}).encode(), self.snapshot)

    def spoil(self) -> None:
        data = self.dice.choice([b"", b"{", b"[]", b'{"entries": [{}, 1]}', b'{"writtenAt": "x"}'])
        self.note("spoil", data)
        self.replace(None)
        put(data, self.snapshot)

    def remove(self) -> None:
        self.note("remove")
        self.replace(None)
        self.snapshot.unlink(missing_ok=True)

    # -------------------------------------------------------------------- the bridge

    async def live(self, wanted: int) -> None:
        """Let a bridge work until it ends, or until so many steps are done."""
        self.note("start", self.settings)
        self.model.restart()
        async with bridge(self.path, **self.settings) as results:
            while self.tally["steps"] < wanted:
                # One after the other: a sync may be on its way, with the snapshot before.
                if self.dice.random() < 0.02:
                    await self.lock(results)
                else:
                    kinds = [self.write, self.publish, self.spoil, self.remove]
                    self.dice.choices(kinds, [40, 20, 2, 1])[0]()
                await self.check(results)
                if self.dice.random() < 0.02:
                    return

    def write(self) -> None:
        """Do some of the other writer's work, each step in a transaction of its own, or at once."""
        steps: list[Callable[[], None]] = [self.move, self.delete, self.come, self.set, self.hear]
        at_once = self.dice.random() < 0.3
        if at_once:
            self.connection.execute("BEGIN IMMEDIATE")
        for _ in range(self.dice.randrange(1, 5)):
            self.dice.choices(steps, [20, 10, 25, 25, 10])[0]()
        if at_once:
            self.connection.execute("COMMIT")
        elif self.dice.random() < 0.05:
            self.reconnect()

    async def lock(self, results: Results) -> None:
        """Hold the write lock while a snapshot comes; the bridge changes nothing meanwhile."""
        self.note("lock")
        self.connection.execute("BEGIN IMMEDIATE")
        before = self.rows()
        self.publish()
        result = await self.sync(results)
        assert result.outcome in ("busy", "unchanged"), result
        assert self.rows() == before
        self.connection.execute("COMMIT")

    async def sync(self, results: Results) -> PersistResult:
        """Ask for a sync; return what came of it. Others may go before."""
        known = len(results.all)
        results.trigger.sync_now()

        def asked() -> list[PersistResult]:
            return [result for result in results.all[known:] if result.reason == "request"]

        await until(asked, "a result")
        return asked()[0]

    def rows(self) -> Rows:
        return {
            table: {
                key: (sup, evidence)
                for key, sup, evidence in self.connection.execute(
                    f"SELECT public_key, multibyte_sup, multibyte_evidence FROM {table}"
                )
            }
            for table in TABLES
        }

    async def check(self, results: Results) -> None:
        """Compare with the model, once the bridge has seen everything."""
        asked, model = time.monotonic(), self.model
        result: PersistResult | None = None
        may_wait = self.is_timeless and self.settings["resync"] != "24h" and not self.is_replaced
        if may_wait and self.dice.random() < 0.3:
            expected = model.sync(Times(self.began, asked, asked), self.rows())
            await until(lambda: self.rows() == expected, f"{expected} after {list(self.steps)}")
            self.tally["found without being asked"] += 1
        else:
            result = await self.sync(results)
            if model.wanted is None:
                assert result.outcome == ("malformed" if self.snapshot.exists() else "no_snapshot")
            else:
                assert result.outcome in ("applied", "unchanged"), (result, list(self.steps))
                counts = [len(model.rows[table].keys() & model.wanted.keys()) for table in TABLES]
                assert [result.matched_active, result.matched_inactive] == counts, result
        found = self.rows()
        expected = model.sync(Times(self.began, asked, time.monotonic()), found)
        wrong = [
            (table, key[:2], found[table].get(key), expected[table].get(key))
            for table in TABLES
            for key in found[table].keys() | expected[table].keys()
            if found[table].get(key) != expected[table].get(key)
        ]
        assert wrong == [], (wrong, model.asks, result, list(self.steps))
        if result is not None and result.compared and self.is_timeless:
            assert result.held == len(model.asks), (result, model.asks, list(self.steps))
        self.tally["lowerings that wait"] += len(model.asks)
        self.began, self.is_replaced = time.monotonic(), False


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    trial = Round(base, random.Random(number))
    count = min(wanted, 2_000)
    try:
        while trial.tally["steps"] < count:
            anyio.run(trial.live, count)
    finally:
        trial.connection.close()
    return trial.tally + Counter({"lowerings after a wait": trial.model.lowered})


CAMPAIGN = Campaign(
    about="random changes by us and another writer: after each sync the rows are those of a model",
    unit="steps",
    full=100_000,
    short=200,
    play=play,
)
