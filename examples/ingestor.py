"""A small MeshCore ingestor with the bridge inside: the host that mbcap-watch is made for.

    python examples/ingestor.py --publish --seconds 5

It receives adverts, from a synthetic mesh or with `--mqtt` from a broker, keeps `nodes` and
`inactive_nodes` as CoreScope does, and has `run` write the server's snapshots into both: through a
connection of the bridge's own or, with `--single-writer`, through the ingestor's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
import itertools
import random
import signal
import sqlite3
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import aiosqlite
import anyio
import msgspec

from mbcap_watch import (
    Control,
    Entry,
    PersistResult,
    Settings,
    Snapshot,
    SnapshotError,
    SnapshotNotFound,
    Trigger,
    apply_snapshot,
    ensure_snapshot_dir,
    read_snapshot,
    run,
    write_snapshot,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

TOPIC = "meshcore/+/+/packets"  # meshcore/{region}/{observer}/packets

TABLE = """
CREATE TABLE IF NOT EXISTS {0} (
    public_key TEXT PRIMARY KEY, name TEXT, role TEXT, lat REAL, lon REAL,
    last_seen TEXT, first_seen TEXT, advert_count INTEGER DEFAULT 0,
    multibyte_sup INTEGER NOT NULL DEFAULT 0, multibyte_evidence TEXT);
CREATE INDEX IF NOT EXISTS idx_{0}_last_seen ON {0} (last_seen);
"""
# Both tables from one text: `SELECT *` moves rows by position.
SCHEMA = "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;" + "".join(
    TABLE.format(table) for table in ("nodes", "inactive_nodes")
)
# Leaves the bridge's two columns alone. An advert_count of 1 tells that the row is new.
UPSERT = """
INSERT INTO nodes (public_key, name, role, lat, lon, last_seen, first_seen, advert_count)
VALUES (:public_key, :name, :role, :lat, :lon, :now, :now, 1)
ON CONFLICT (public_key) DO UPDATE SET
    name = coalesce(:name, name), role = coalesce(:role, role), lat = coalesce(:lat, lat),
    lon = coalesce(:lon, lon), last_seen = :now, advert_count = advert_count + 1
RETURNING advert_count
"""
# With one cutoff for both, so that what is deleted was copied. OR REPLACE, because a node that went
# stale before and came back has a row in both tables.
RETIRE = (
    "INSERT OR REPLACE INTO inactive_nodes SELECT * FROM nodes WHERE last_seen < ?",
    "DELETE FROM nodes WHERE last_seen < ?",
)
VALUES = """
SELECT public_key, multibyte_sup, multibyte_evidence FROM nodes UNION ALL
SELECT public_key, multibyte_sup, multibyte_evidence FROM inactive_nodes
"""
SUP = {"confirmed": 2, "suspected": 1}  # "unknown" is never written


class Advert(msgspec.Struct, frozen=True):
    """What a node says of itself; over MQTT as JSON (CoreScope decodes the raw packet here)."""

    public_key: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    name: str | None = None
    role: str | None = None
    lat: float | None = None
    lon: float | None = None


async def synthetic(nodes: int, phase: float) -> AsyncGenerator[Advert]:
    """Yield adverts of a mesh of which another third is silent in each phase (in seconds)."""
    source = random.Random(1)
    mesh = [Advert(f"{source.getrandbits(256):064x}", f"node {n}") for n in range(nodes)]
    for number, advert in itertools.cycle(enumerate(mesh)):
        if number % 3 != time.monotonic() // phase % 3:
            yield advert
        await anyio.sleep(0.001)


async def from_broker(aiomqtt: Any, host: str, port: int) -> AsyncGenerator[Advert]:
    """Yield what a broker sends; connect again whenever the connection is lost."""
    while True:
        try:
            async with aiomqtt.Client(host, port) as client:
                await client.subscribe(TOPIC)
                print(f"listening to {TOPIC} on {host}:{port}")
                async for message in client.messages:
                    with contextlib.suppress(msgspec.MsgspecError):  # anybody may send anything
                        yield msgspec.json.decode(message.payload, type=Advert)
        except aiomqtt.MqttError as exc:
            print(f"{host}:{port}: {exc}; trying again")
            await anyio.sleep(1)


@dataclasses.dataclass
class Ingestor:
    """Keeps the nodes, through one connection, which is in autocommit and used under the lock."""

    connection: aiosqlite.Connection
    settings: Settings
    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    trigger: Trigger = dataclasses.field(default_factory=Trigger)
    newcomers: bool = False
    packets: int = 0
    persisted: int = 0

    async def ingest(self, adverts: AsyncGenerator[Advert]) -> None:
        """Write adverts as they come."""
        async with contextlib.aclosing(adverts):
            async for advert in adverts:
                values = {**msgspec.structs.asdict(advert), "now": timestamp()}
                async with self.lock:  # one statement, and so a transaction of its own
                    [(count,)] = await self.connection.execute_fetchall(UPSERT, values)
                self.packets += 1
                self.newcomers |= count == 1

    async def keep_house(self, stale: float) -> None:
        """Now and then, retire nodes, and see that newcomers get their values."""
        while True:
            await anyio.sleep(0.25)
            await self.retire(timestamp(ago=stale))
            if self.newcomers:  # the resync would come minutes later
                self.newcomers = False
                self.trigger.sync_now()

    async def retire(self, before: str) -> None:
        """Move the nodes last seen before then, all of them or none."""
        # Shielded: a transaction that a cancellation leaves open would keep the write lock.
        with anyio.CancelScope(shield=True):
            async with self.lock:
                await self.connection.execute("BEGIN IMMEDIATE")
                try:
                    for sql in RETIRE:
                        await self.connection.execute(sql, [before])
                    await self.connection.commit()
                finally:
                    await self.connection.rollback()  # of no effect after the commit

    async def catch_up(self) -> None:
        """Have the snapshot applied to what came, or came back, since the bridge's last sync."""
        snapshot = await self.snapshot()
        self.report(await apply_snapshot(self.connection, snapshot, lock=self.lock))

    async def snapshot(self) -> Snapshot:
        """Read the snapshot; one that is not there or not whole changes no row: it is empty."""
        try:
            return await anyio.to_thread.run_sync(read_snapshot, self.settings.database)
        except SnapshotError as exc:
            if not isinstance(exc, SnapshotNotFound):
                print(exc)
            return Snapshot()

    def report(self, result: PersistResult) -> None:
        """Count what was written, and print a line if there is something to tell."""
        rows = result.changed_active + result.changed_inactive
        self.persisted += rows
        if rows or result.error:
            took = f"{rows} rows in {result.seconds * 1000:.1f} ms"
            print(f"{result.reason}: {result.outcome}, {took}", *filter(None, [result.error]))

    async def summarize(self) -> bool:
        """Print a summary; return whether every row is as the snapshot wants it."""
        entries = (await self.snapshot()).entries
        wanted = {
            e.public_key: (SUP[e.status], e.evidence or "") for e in entries if e.status in SUP
        }
        rows = await self.connection.execute_fetchall(VALUES)
        values = [(key, (sup, evidence)) for key, sup, evidence in rows]
        wrong = sum(value != wanted.get(key, value) for key, value in values)
        print(
            f"{self.packets} packets, {len(dict(values))} nodes,"
            f" {self.persisted} rows persisted, {wrong} rows wrong"
        )
        return wrong == 0


def timestamp(*, ago: float = 0.0) -> str:
    """Return the time `ago` seconds before now, as text that sorts by time."""
    moment = datetime.now(UTC) - timedelta(seconds=ago)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def play_server(database: Path) -> None:
    """Publish a changed snapshot every second; as CoreScope's server, never write a row."""
    found: dict[str, Entry] = {}

    def publish() -> None:
        uri = f"{database.as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            for key, *_ in connection.execute(VALUES):
                if key not in found or not random.randrange(10):
                    finding = random.choice(["unknown", "suspected path", "confirmed advert"])
                    found[key] = Entry(key, *finding.split())
        write_snapshot(database, Snapshot(tuple(found.values())))

    while True:
        await anyio.to_thread.run_sync(publish)  # it waits for the disk
        await anyio.sleep(1)


async def serve(options: argparse.Namespace, database: Path) -> bool:
    """Ingest until it is time, or somebody says stop; return whether every row is right."""
    if options.mqtt:
        adverts, stale = from_broker(options.aiomqtt, *options.mqtt), 7 * 24 * 3600.0
    else:
        phase = max(1.0, options.nodes / 200)
        adverts, stale = synthetic(options.nodes, phase), phase / 2
    settings = Settings(database)
    ensure_snapshot_dir(database)  # there is something to watch from the start
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with aiosqlite.connect(database, isolation_level=None) as connection:
            await connection.executescript(SCHEMA)
            ingestor = Ingestor(connection, settings)
            bridge = partial(run, on_result=ingestor.report, trigger=ingestor.trigger)
            bridge = partial(bridge, control=Control(settings))  # for `mbcap-watch status`
            if options.single_writer:
                bridge = partial(bridge, connection=connection, lock=ingestor.lock)
            async with anyio.create_task_group() as group:
                await group.start(bridge, settings)  # until it watches
                group.start_soon(ingestor.keep_house, stale)
                group.start_soon(ingestor.ingest, adverts)
                if options.publish:
                    group.start_soon(play_server, database)
                print(f"ingesting into {database}")
                with anyio.move_on_after(options.seconds):
                    await anext(signals)
                group.cancel_scope.cancel()
            await ingestor.catch_up()
            return await ingestor.summarize()


def address(text: str) -> tuple[str, int]:
    """Read HOST or HOST:PORT."""
    host, _, port = text.partition(":")
    return host, int(port or 1883)


def main() -> int:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("--database", type=Path, help="default: in a temporary directory")
    option("--seconds", type=float, help="stop after so long; default: at Ctrl-C")
    option("--nodes", type=int, default=200, help="size of the synthetic mesh")
    option("--mqtt", type=address, metavar="HOST[:PORT]", help="adverts from a broker instead")
    option("--publish", action="store_true", help="play the server, too: publish every second")
    option("--single-writer", action="store_true", help="write through one connection only")
    options = parser.parse_args()
    if options.mqtt:
        try:
            options.aiomqtt = importlib.import_module("aiomqtt")
        except ImportError:
            parser.exit(2, "ingestor.py: --mqtt needs aiomqtt: pip install aiomqtt\n")
    with tempfile.TemporaryDirectory(prefix="ingestor-") as directory:
        database = (options.database or Path(directory, "meshcore.db")).resolve()
        return 0 if anyio.run(serve, options, database) else 1


if __name__ == "__main__":
    sys.exit(main())
