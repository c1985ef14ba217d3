"""The demo: a mesh, a bridge, and a publisher in another process; every row is checked.

`python -m mbcap_watch.cli.demo` is that other process. It publishes one snapshot for every line on
its standard input and answers with the moment of the rename.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream
from rich.console import Console

from mbcap_watch.bridge.run import run
from mbcap_watch.cli import config
from mbcap_watch.snapshot.files import (
    SNAPSHOT_NAME,
    Entry,
    Snapshot,
    ensure_snapshot_dir,
    snapshot_path,
    write_snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mbcap_watch.results import PersistResult, WatchState
    from mbcap_watch.settings import Settings

SEED: Final = 20261122
LANDING_SECONDS: Final = 30.0

# Without a pause, two renames would be one burst, and one sync.
_PAUSE_SECONDS: Final = 0.2


class Landing(NamedTuple):
    """A snapshot that arrived in the database.

    Attributes:
        seconds: from the rename to the committed rows.
        right: whether every row of the database is then as the snapshots so far want it.

    """

    result: PersistResult
    seconds: float
    right: bool


def main(*, nodes: int, snapshots: int, **given: str | None) -> bool:
    """Run the demo in a temporary directory; return whether every row was right.

    Raises:
        SettingsError: one of the settings that are `given` is unusable.

    """
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="mbcap-watch-demo-") as directory:
        database = Path(directory) / "meshcore.db"
        settings = config.load({**given, "database": database}, {}, os.devnull).settings
        create_database(database, nodes, SEED)
        ensure_snapshot_dir(database)
        console.print(f"A mesh of {nodes:,} nodes in {database}")
        landings = anyio.run(_watch, settings, nodes, snapshots, console)
    return _summarize(landings, snapshots, console)


async def _watch(settings: Settings, nodes: int, snapshots: int, console: Console) -> list[Landing]:
    results: asyncio.Queue[tuple[PersistResult, int]] = asyncio.Queue()
    wanted: dict[str, tuple[int, str | None]] = dict.fromkeys(keys(nodes, SEED), (0, None))
    landings: list[Landing] = []
    said: set[str] = set()

    def on_result(result: PersistResult) -> None:
        results.put_nowait((result, time.monotonic_ns()))

    def on_state(state: WatchState) -> None:
        line = f"Watching by {state.mode}: {state.why}"
        if line not in said:
            said.add(line)
            console.print(line)

    async def bridge(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        await run(settings, on_result=on_result, on_state=on_state, task_status=task_status)

    command = [sys.executable, "-m", __spec__.name, settings.database, nodes, snapshots]
    async with (
        await anyio.open_process([str(part) for part in command], stderr=None) as publisher,
        anyio.create_task_group() as group,
    ):
        assert publisher.stdout is not None
        answers = BufferedByteReceiveStream(publisher.stdout)
        await group.start(bridge)
        results.get_nowait()  # of the start: there was no snapshot yet
        console.print("A publisher in another process replaces the snapshot by rename:\n")
        for number, snapshot in enumerate(series(nodes, snapshots, SEED), 1):
            await anyio.sleep(_PAUSE_SECONDS)
            renamed_at = await _ask(publisher, answers)
            with anyio.move_on_after(LANDING_SECONDS):
                result, committed_at = await results.get()
                _expect(wanted, snapshot)
                right = _rows(settings.database) == wanted
                landing = Landing(result, (committed_at - renamed_at) / 1e9, right)
                landings.append(landing)
                console.print(_line(number, landing))
                continue
            console.print(f"  {number:2}  did not arrive within {LANDING_SECONDS:g} s")
        group.cancel_scope.cancel()
    return landings


def _expect(wanted: dict[str, tuple[int, str | None]], snapshot: Snapshot) -> None:
    """Note in `wanted` what the rows must be after `snapshot`, without the code under test."""
    for entry in snapshot.entries:
        if entry.public_key is not None and entry.status in ("confirmed", "suspected"):
            wanted[entry.public_key] = (2 if entry.status == "confirmed" else 1, entry.evidence)


def _rows(database: Path) -> dict[str, tuple[int, str | None]]:
    """Return every row, read through a connection of its own, as another program would."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return {
            key: (sup, evidence)
            for table in ("nodes", "inactive_nodes")
            for key, sup, evidence in connection.execute(
                f"SELECT public_key, multibyte_sup, multibyte_evidence FROM {table}"
            )
        }


def _line(number: int, landing: Landing) -> str:
    result = landing.result
    verdict = "[green]every row is right[/]" if landing.right else "[red]rows are wrong[/]"
    return (
        f"  {number:2}  {landing.seconds * 1000:7.1f} ms  {result.entries:,} entries,"
        f" {result.changed:5,} rows changed  {verdict}"
    )


def _summarize(landings: list[Landing], snapshots: int, console: Console) -> bool:
    right = len(landings) == snapshots and all(landing.right for landing in landings)
    changed = sum(landing.result.changed for landing in landings)
    console.print(f"\n{len(landings)} of {snapshots} snapshots arrived, {changed:,} rows changed.")
    if landings:
        times = [landing.seconds * 1000 for landing in landings]
        lock = max(landing.result.lock_seconds for landing in landings) * 1000
        console.print(
            f"From rename to committed rows: {statistics.median(times):.1f} ms in the median,"
            f" {max(times):.1f} ms at most; the write lock was held for {lock:.1f} ms at most."
        )
    console.print("[green]Every row is right.[/]" if right else "[red]Something is wrong.[/]")
    return right


# ------------------------------------------------------------------------------ the mesh

# The two tables of CoreScope, with the columns that matter here and a few that make rows as wide
# as real ones.
_SCHEMA = """
CREATE TABLE {table} (
    public_key TEXT PRIMARY KEY,
    name TEXT,
    role TEXT,
    lat REAL,
    lon REAL,
    last_seen TEXT,
    first_seen TEXT,
    advert_count INTEGER DEFAULT 0,
    multibyte_sup INTEGER NOT NULL DEFAULT 0,
    multibyte_evidence TEXT
)
"""
_INACTIVE_SHARE = 0.1
_STATUSES = (("unknown", None), ("suspected", "path"), ("confirmed", "advert"))
_WEIGHTS = (70, 20, 10)


def keys(nodes: int, seed: int) -> list[str]:
    """Return the public keys of the mesh: 64 hex digits each."""
    source = random.Random(seed)
    return [f"{source.getrandbits(256):064x}" for _ in range(nodes)]


def create_database(path: Path, nodes: int, seed: int) -> None:
    """Create a database in WAL mode with `nodes` nodes, a tenth of them in `inactive_nodes`."""
    inactive = int(nodes * _INACTIVE_SHARE)
    rows = [
        (key, f"node {key[:6]}", "repeater", 52.5, 13.4, "2026-11-01T00:00:00Z", "2026-01-01", 7)
        for key in keys(nodes, seed)
    ]
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = wal")
        for table, part in (("nodes", rows[inactive:]), ("inactive_nodes", rows[:inactive])):
            connection.execute(_SCHEMA.format(table=table))
            connection.executemany(
                f"INSERT INTO {table} (public_key, name, role, lat, lon, last_seen, first_seen,"
                " advert_count) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                part,
            )


def series(nodes: int, count: int, seed: int) -> Iterator[Snapshot]:
    """Yield `count` snapshots; from one to the next about every hundredth node changes."""
    source = random.Random(seed + 1)
    statuses = {key: _pick(source) for key in keys(nodes, seed)}
    for number in range(count):
        if number:
            for key in source.sample(sorted(statuses), max(1, nodes // 100)):
                statuses[key] = _pick(source)
        yield Snapshot(tuple(Entry(key, *status) for key, status in statuses.items()))


def _pick(source: random.Random) -> tuple[str, str | None]:
    return source.choices(_STATUSES, _WEIGHTS)[0]


# ------------------------------------------------------------------------------ the publisher


async def _ask(publisher: anyio.abc.Process, answers: BufferedByteReceiveStream) -> int:
    """Have the publisher replace the snapshot; return the monotonic time of the rename, in ns."""
    assert publisher.stdin is not None
    await publisher.stdin.send(b"\n")
    return int(await answers.receive_until(b"\n", 64))


def publish(database: Path, nodes: int, count: int) -> None:
    """Publish one snapshot per line on standard input; print the monotonic time of each rename.

    Each snapshot is first written in full in another directory, so that the rename alone is timed.
    """
    staging = database.parent / "staging"
    for _, snapshot in zip(sys.stdin, series(nodes, count, SEED), strict=False):
        write_snapshot(database, snapshot, snapshot_dir=staging)
        renamed_at = time.monotonic_ns()
        os.replace(staging / SNAPSHOT_NAME, snapshot_path(database))
        print(renamed_at, flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    publish(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
