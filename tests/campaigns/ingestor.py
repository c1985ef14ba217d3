"""A real ingestor's traffic with a bridge in or beside it, and upstream is not steady.

Three ingestors, each with a database of its own: one lends its connection to `run`, one has `run`
open another, one has the daemon beside it. All bridges hold downgrades. One publisher alternates
what is true with what CoreScope's server says wrongly after a hot start, and to a request with a
filter: nodes that are confirmed are called suspected, each time for less than `downgrade_hold`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import aiosqlite
import anyio

from campaigns.campaign import Campaign
from mbcap_watch import PersistResult, Settings, run, snapshot_path
from processes import daemon
from support import DEADLINE, connect, document, put, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
    from pathlib import Path

FULL: Final = 600  # seconds, all in one round

# As CoreScope has it, shortened; and what notes every value that is changed in place. The host
# itself changes none: its nodes are inserted blank, moved, and deleted.
NODE: Final = """(public_key TEXT PRIMARY KEY, name TEXT, role TEXT, lat REAL, lon REAL,
  last_seen REAL, first_seen REAL, advert_count INTEGER DEFAULT 0, battery_mv INTEGER,
  multibyte_sup INTEGER NOT NULL DEFAULT 0, multibyte_evidence TEXT);"""
NOTE: Final = """
CREATE TRIGGER of_{0} AFTER UPDATE OF multibyte_sup, multibyte_evidence ON {0} BEGIN
  INSERT INTO noted (at, came, key, before, sup, evidence) VALUES (
    (julianday('now') - 2440587.5) * 86400, new.first_seen, new.public_key,
    old.multibyte_sup, new.multibyte_sup, new.multibyte_evidence); END;"""
SCHEMA: Final = f"""
PRAGMA journal_mode = wal;
CREATE TABLE nodes {NODE} CREATE TABLE inactive_nodes {NODE}
CREATE INDEX idx_nodes_last_seen ON nodes(last_seen);
CREATE INDEX idx_inactive_nodes_last_seen ON inactive_nodes(last_seen);
CREATE TABLE transmissions (id INTEGER PRIMARY KEY AUTOINCREMENT, raw_hex TEXT NOT NULL,
  hash TEXT NOT NULL UNIQUE, first_seen REAL NOT NULL);
CREATE TABLE observations (id INTEGER PRIMARY KEY AUTOINCREMENT,
  transmission_id INTEGER NOT NULL REFERENCES transmissions(id), snr REAL, timestamp REAL NOT NULL);
CREATE INDEX idx_observations_transmission_id ON observations(transmission_id);
CREATE TABLE noted (id INTEGER PRIMARY KEY, at REAL, came REAL, key TEXT, before INTEGER,
  sup INTEGER, evidence TEXT);
{NOTE.format("nodes")} {NOTE.format("inactive_nodes")}"""
PACKET: Final = """INSERT INTO transmissions (raw_hex, hash, first_seen)
  VALUES (hex(randomblob(80)), hex(randomblob(8)), ?) RETURNING id"""
OBSERVATION: Final = """INSERT INTO observations (transmission_id, snr, timestamp)
  VALUES (?, ?, ?)"""
ADVERT: Final = """INSERT INTO nodes (public_key, last_seen, first_seen, advert_count)
  VALUES (?1, ?2, ?2, 1) ON CONFLICT (public_key)
  DO UPDATE SET last_seen = ?2, advert_count = advert_count + 1"""
STALE: Final = "SELECT public_key FROM nodes WHERE last_seen < ?"
RETIRE: Final = (
    "INSERT OR REPLACE INTO inactive_nodes SELECT * FROM nodes WHERE last_seen < ?",
    "DELETE FROM nodes WHERE last_seen < ?",
    "DELETE FROM observations WHERE timestamp < ?",
)
FORGET: Final = "DELETE FROM transmissions WHERE first_seen < ? RETURNING id"
ROWS: Final = """
SELECT public_key, multibyte_sup, multibyte_evidence FROM nodes UNION ALL
SELECT public_key, multibyte_sup, multibyte_evidence FROM inactive_nodes"""
COUNTS: Final = "SELECT public_key, advert_count FROM nodes"

SUP: Final = {"confirmed": 2, "suspected": 1}
EVIDENCE: Final = {"confirmed": "advert", "suspected": "path"}

# A bridge may not have read yet what was published a moment ago; and how late a downgrade that is
# due may be written at most, in seconds. Both are for a machine that is very busy.
UNREAD: Final = 10.0
LATEST: Final = 10.0


class Pace(NamedTuple):
    """How quickly all goes, in seconds."""

    seconds: float

    @property
    def hold(self) -> float:
        return min(20.0, max(0.5, self.seconds / 30))

    @property
    def beat(self) -> float:
        """From one snapshot to the next."""
        return self.hold / 10

    @property
    def packets(self) -> float:
        """From one packet to the next."""
        return min(0.0125, self.hold / 100)


# ------------------------------------------------------------------------------ the ingestor


class Ingestor:
    """The only writer of a database but for the bridge, and what it knows to have written."""

    def __init__(self, database: Path, connection: aiosqlite.Connection, pace: Pace) -> None:
        self.database, self.connection, self.pace = database, connection, pace
        self.lock, self.over = asyncio.Lock(), asyncio.Event()
        self.stamps: list[str | None] = []  # of the snapshots that its bridge has told of
        self.has_told: Callable[[str], bool] = self.stamps.__contains__
        self.waits: list[float] = []
        self.active: dict[str, int] = {}  # how often each node was heard since it came
        self.heard: set[str] = set()
        self.packets = self.kept = self.returned = 0
        self.bridge: asyncio.Task[None]

    def on_result(self, result: PersistResult) -> None:
        self.stamps.append(result.written_at)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Callable[..., Awaitable[Iterable[Any]]]]:
        async with self.lock:
            await self.connection.execute("BEGIN IMMEDIATE")
            yield self.connection.execute_fetchall
            await self.connection.commit()

    async def advert(self, key: str, at: float) -> None:
        await self.connection.execute_fetchall(ADVERT, (key, at))
        self.returned += key in self.heard and key not in self.active
        self.heard.add(key)
        self.active[key] = self.active.get(key, 0) + 1

    async def hear(self, keys: list[str]) -> None:
        """Write packets, every other of which is an advert; another third is silent each time."""
        phase = 6 * self.pace.hold
        for number, key in itertools.cycle(enumerate(keys)):
            if self.over.is_set():
                return
            if number % 3 == time.monotonic() // phase % 3:
                continue
            now, started = time.time(), time.perf_counter()
            async with self.transaction() as execute:
                [(packet,)] = await execute(PACKET, (now,))
                await execute(OBSERVATION, (packet, number / 7, now))
                if self.packets % 2 == 0:
                    await self.advert(key, now)
            self.waits.append(time.perf_counter() - started)
            self.packets, self.kept = self.packets + 1, self.kept + 1
            await asyncio.sleep(self.pace.packets)

    async def keep_house(self) -> None:
        """Retire nodes, and delete old packets."""
        while not self.over.is_set():
            with anyio.move_on_after(self.pace.hold / 4):
                await self.over.wait()
            stale = (time.time() - 3 * self.pace.hold,)
            async with self.transaction() as execute:
                for (key,) in await execute(STALE, stale):
                    del self.active[key]
                for sql in RETIRE:
                    await execute(sql, stale)
                self.kept -= len(list(await execute(FORGET, stale)))


# ------------------------------------------------------------------------------ the publisher


class Published(NamedTuple):
    """What was published, when that began, and when all bridges had read it, by time.time()."""

    at: float
    read: float
    values: dict[str, tuple[int, str]]


class Publisher:
    """Publishes the same for all ingestors, and remembers it."""

    def __init__(
        self, ingestors: list[Ingestor], keys: list[str], dice: random.Random, pace: Pace
    ) -> None:
        self.ingestors, self.keys, self.dice, self.pace = ingestors, keys, dice, pace
        self.truth = {key: dice.choice(["confirmed"] * 3 + ["suspected"]) for key in keys}
        self.published: list[Published] = []

    async def publish(self, statuses: dict[str, str]) -> None:
        """Publish, and return when all bridges have read it: what they miss, they cannot know."""
        stamp = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        entries = [(key, status, EVIDENCE[status]) for key, status in statuses.items()]
        values = {key: (SUP[status], evidence) for key, status, evidence in entries}
        unknown = [(f"{number:x}", "unknown") for number in range(len(self.keys) // 3)]
        data = document(*entries, *unknown, written_at=stamp)
        began = time.time()
        for ingestor in self.ingestors:
            await asyncio.to_thread(put, data, snapshot_path(ingestor.database))
        for ingestor in self.ingestors:
            told = partial(ingestor.has_told, stamp)
            await until(told, f"what {ingestor.database} has to tell of {stamp}")
        self.published.append(Published(began, time.time(), values))
        await asyncio.sleep(self.pace.beat)

    async def err(self, keys: list[str]) -> None:
        """Call nodes suspected for a while, and take it back."""
        for statuses in (dict.fromkeys(keys, "suspected"), self.truth):
            for _ in range(self.dice.randint(1, 4)):
                await self.publish(statuses)

    async def storm(self) -> None:
        """Change some of the truth, and publish it in turn with what is wrong."""
        for old, new in (("confirmed", "suspected"), ("suspected", "confirmed")):
            some = [key for key, status in self.truth.items() if status == old]
            self.truth.update(dict.fromkeys(self.dice.sample(some, min(len(some), 5)), new))
        for _ in range(2):
            await self.err(self.keys[self.dice.randrange(3) :: 3])  # asked for with a filter
        calm = time.monotonic() + 1.2 * self.pace.hold
        while time.monotonic() < calm:
            await self.err(self.keys)  # a hot start: it does not raise what is true
        await self.settle(above)

    async def settle(self, differs: Callable[[Path, dict[str, str]], bool]) -> None:
        """Return when no database differs from the truth any more."""
        with anyio.fail_after(DEADLINE):
            for ingestor in self.ingestors:
                while await asyncio.to_thread(differs, ingestor.database, self.truth):
                    await asyncio.sleep(self.pace.beat)


def rows(database: Path) -> list[tuple[str, int, str | None]]:
    with connect(database) as connection:
        return connection.execute(ROWS).fetchall()


def differs(database: Path, truth: dict[str, str]) -> bool:
    wanted = {key: (SUP[status], EVIDENCE[status]) for key, status in truth.items()}
    return any((sup, evidence) != wanted[key] for key, sup, evidence in rows(database))


def above(database: Path, truth: dict[str, str]) -> bool:
    return any(sup > SUP[truth[key]] for key, sup, _ in rows(database))


# ------------------------------------------------------------------------------ the judge


class Noted(NamedTuple):
    """A value that was changed in place."""

    at: float
    came: float  # when the node did
    key: str
    before: int
    sup: int
    evidence: str


def spans(change: Noted, published: list[Published]) -> Iterator[tuple[float, float]]:
    """Return from when to when all that was published, until the change, has asked for it.

    What takes it back counts once the bridges have read that: until then they may do what they were
    asked for.
    """
    since: float | None = None
    for each in itertools.takewhile(lambda each: each.at < change.at, published):
        asks = each.values.get(change.key) == (change.sup, change.evidence)
        if asks and since is None:
            since = each.at
        elif since is not None and not asks:
            yield since, min(each.read, change.at)
            since = None
    if since is not None:
        yield since, change.at


def judge(ingestor: Ingestor, published: list[Published]) -> dict[str, list[float]]:
    """Check every change, and that nothing was lost; return how late which changes were."""
    late: dict[str, list[float]] = {"lowered": [], "raised": [], "blank": []}
    with connect(ingestor.database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert dict(connection.execute(COUNTS).fetchall()) == ingestor.active
        for table in ("transmissions", "observations"):
            counted = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
            assert counted == (ingestor.kept,)
        noted = connection.execute("SELECT at, came, key, before, sup, evidence FROM noted")
        for change in itertools.starmap(Noted, noted.fetchall()):
            said = [span for span in spans(change, published) if span[1] > change.at - UNREAD]
            assert said, f"{ingestor.database}: nobody has asked for it: {change}"
            wait = ingestor.pace.hold if change.sup < change.before else 0.0
            said = [(since, until) for since, until in said if until - since >= wait]
            assert said, f"{ingestor.database}: too early: {change}"
            kind = "lowered" if wait else "raised" if change.before else "blank"
            late[kind].append(change.at - max(said[-1][0] + wait, change.came))
    assert max(late["lowered"], default=0) <= LATEST
    return late


# ------------------------------------------------------------------------------ all together


async def tick(stalls: list[float]) -> None:
    """Note by how much the loop is late, at every turn."""
    while True:
        started = time.perf_counter()
        await asyncio.sleep(0.001)
        stalls.append(time.perf_counter() - started - 0.001)


@contextlib.asynccontextmanager
async def ingestors(base: Path, keys: list[str], pace: Pace) -> AsyncIterator[list[Ingestor]]:
    """Make databases in which half of the nodes will soon be stale, and open them."""
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for kind in ("lent", "own", "daemon"):
            (base / kind).mkdir()
            database = base / kind / "meshcore.db"
            opened = aiosqlite.connect(database, isolation_level=None)
            made.append(Ingestor(database, await stack.enter_async_context(opened), pace))
            await made[-1].connection.executescript(SCHEMA)
            for number, key in enumerate(keys):
                await made[-1].advert(key, time.time() if number % 2 else 0.0)
        yield made


async def ingest(base: Path, number: int, pace: Pace) -> Counter[str]:
    dice, stalls = random.Random(number), list[float]()
    keys = [f"{dice.getrandbits(256):064x}" for _ in range(30 if pace.seconds < 60 else 600)]
    clocks: dict[str, Any] = {
        "downgrade_hold": pace.hold,
        "sweep_interval": min(5.0, pace.hold / 4),
        "debounce": min(0.1, pace.beat / 4),
    }
    options = [f"--{key.replace('_', '-')}={value}s" for key, value in clocks.items()]
    async with ingestors(base, keys, pace) as hosts:
        lent, own, third = hosts
        publisher = Publisher(hosts, keys, dice, pace)
        with daemon(third.database, "--downgrade=hold", *options) as beside:
            third.has_told = lambda stamp: any(stamp in line for line in beside.lines[-20:])
            async with asyncio.TaskGroup() as group:
                bridge = partial(run, connection=lent.connection, lock=lent.lock)
                for host, function in ((lent, bridge), (own, run)):
                    settings = Settings(host.database, downgrade="hold", **clocks)
                    host.bridge = group.create_task(function(settings, on_result=host.on_result))
                await publisher.publish(publisher.truth)
                await publisher.settle(differs)
                traffic = [group.create_task(host.hear(keys)) for host in hosts]
                traffic += [group.create_task(host.keep_house()) for host in hosts]
                ticker = group.create_task(tick(stalls))
                ends = time.monotonic() + pace.seconds
                while time.monotonic() < ends:
                    await publisher.storm()
                ticker.cancel()
                for host in hosts:
                    host.over.set()
                await asyncio.gather(*traffic)
                await publisher.settle(differs)
                for host in (lent, own):
                    host.bridge.cancel()
            assert beside.end(signal.SIGTERM) == 0, beside.said
        assert not any(thread.name == "mbcap-watch" for thread in threading.enumerate())
        assert not any(host.lock.locked() for host in hosts)

    tally = Counter(seconds=round(pace.seconds), publications=len(publisher.published))
    tally += figures("the loop stalls", stalls)
    for host in hosts:
        kind = host.database.parent.name
        tally += Counter({f"{kind}: packets": host.packets, f"{kind}: returned": host.returned})
        tally += figures(f"{kind}: a packet waits", host.waits)
        for change, late in judge(host, publisher.published).items():
            tally += figures(f"{kind}: {change}, late by", late)
            tally[f"{kind}: {change}"] = len(late)
        assert tally[f"{kind}: lowered"], f"{kind}: nothing was lowered"
    return tally


def figures(what: str, times: list[float]) -> Counter[str]:
    """Return times as whole microseconds, which a tally can hold."""
    times = sorted(times) or [0.0]
    places = {
        percent: min(len(times) - 1, len(times) * percent // 100) for percent in (50, 99, 100)
    }
    return Counter({f"{what}, p{p}, µs": round(times[at] * 1e6) for p, at in places.items()})


def play(base: Path, number: int, wanted: int) -> Counter[str]:
    return asyncio.run(ingest(base, number, Pace(float(min(wanted, FULL)))))


CAMPAIGN = Campaign(
    about="an ingestor's traffic and a storm of downgrades: none comes early, each in time, no"
    " packet is lost",
    unit="seconds",
    full=FULL,
    short=1,
    play=play,
)
