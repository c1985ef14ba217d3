"""The demo: a mesh, a bridge, and a publisher in another process; every row is checked.

`python -m mbcap_watch.cli.demo` is that other process. It publishes one snapshot for every line on
its standard input and answers with the moment of the rename.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream
from rich.console import Console

from mbcap_watch import Entry, Snapshot, ensure_snapshot_dir, snapshot_path, watch, write_snapshot
from mbcap_watch.cli import config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mbcap_watch import PersistResult, Settings

Rows = dict[str, tuple[int, str | None]]

SEED: Final = 20261122
LANDING_SECONDS: Final = 30.0

# Without a pause, two renames would be one burst, and one sync.
_PAUSE_SECONDS: Final = 0.2


def main(*, nodes: int, snapshots: int, **given: str | None) -> bool:
    """Run the demo in a temporary directory; return whether every row was right."""
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="mbcap-watch-demo-") as directory:
        database = Path(directory) / "meshcore.db"
        settings = config.load({**given, "database": database}, {}, os.devnull).settings
        create_database(database, nodes, SEED)
        ensure_snapshot_dir(database)
        console.print(f"A mesh of {nodes:,} nodes in {database}")
        return anyio.run(_watch, settings, nodes, snapshots, console)


async def _watch(settings: Settings, nodes: int, snapshots: int, console: Console) -> bool:
    wanted: Rows = dict.fromkeys(keys(nodes, SEED), (0, None))
    command = [sys.executable, "-m", __spec__.name, settings.database, nodes, snapshots]
    times: list[float] = []  # from each rename to the committed rows, in ms
    applied: list[PersistResult] = []
    right = True
    async with (
        watch(settings) as results,
        await anyio.open_process([str(part) for part in command], stderr=None) as publisher,
    ):
        console.print(f"Watching by {results.state.mode}: {results.state.why}")
        console.print("A publisher in another process replaces the snapshot by rename:\n")
        assert publisher.stdin is not None
        assert publisher.stdout is not None
        answers = BufferedByteReceiveStream(publisher.stdout)
        await anext(results)  # of the start: there was no snapshot yet
        for number, statuses in enumerate(series(nodes, snapshots), 1):
            await anyio.sleep(_PAUSE_SECONDS)
            await publisher.stdin.send(b"\n")
            renamed_at = int(await answers.receive_until(b"\n", 64))
            with anyio.move_on_after(LANDING_SECONDS) as limit:
                result = await anext(results)
            if limit.cancelled_caught:
                console.print(f"  {number:2}  did not arrive within {LANDING_SECONDS:g} s")
                continue
            times.append((time.monotonic_ns() - renamed_at) / 1e6)
            applied.append(result)
            wanted |= {
                key: (_SUP[status], evidence)
                for key, (status, evidence) in statuses.items()
                if status in _SUP
            }
            same = _rows(settings.database) == wanted
            right = right and same
            verdict = "[green]every row is right[/]" if same else "[red]rows are wrong[/]"
            console.print(
                f"  {number:2}  {times[-1]:7.1f} ms  {result.entries:,} entries,"
                f" {result.changed:5,} rows changed  {verdict}"
            )
    changed = sum(result.changed for result in applied)
    console.print(f"\n{len(times)} of {snapshots} snapshots arrived, {changed:,} rows changed.")
    if times:
        held = max(result.lock_seconds for result in applied) * 1000
        console.print(
            f"From rename to committed rows: {statistics.median(times):.1f} ms in the median,"
            f" {max(times):.1f} ms at most; the write lock was held for {held:.1f} ms at most."
        )
    right = right and len(times) == snapshots
    console.print("[green]Every row is right.[/]" if right else "[red]Something is wrong.[/]")
    return right


def _rows(database: Path) -> Rows:
    """Return every row, read through a connection of its own, as another program would."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return {
            key: (sup, evidence)
            for table in ("nodes", "inactive_nodes")
            for key, sup, evidence in connection.execute(
                f"SELECT public_key, multibyte_sup, multibyte_evidence FROM {table}"
            )
        }


# The two tables of CoreScope, with the columns that matter here and a few that make rows as wide
# as real ones.
_SCHEMA: Final = """
CREATE TABLE {table} (
    public_key TEXT PRIMARY KEY, name TEXT, role TEXT, lat REAL, lon REAL, last_seen TEXT,
    first_seen TEXT, advert_count INTEGER DEFAULT 0,
    multibyte_sup INTEGER NOT NULL DEFAULT 0, multibyte_evidence TEXT
)
"""
Status = tuple[str, str | None]
_STATUSES: Final[tuple[Status, ...]] = (
    ("unknown", None),
    ("suspected", "path"),
    ("confirmed", "advert"),
)
_WEIGHTS: Final = (70, 20, 10)
_SUP: Final = {"suspected": 1, "confirmed": 2}


def keys(nodes: int, seed: int) -> list[str]:
    """Return the public keys of the mesh: 64 hex digits each."""
    source = random.Random(seed)
    return [f"{source.getrandbits(256):064x}" for _ in range(nodes)]


def create_database(path: Path, nodes: int, seed: int) -> None:
    """Create a database in WAL mode with `nodes` nodes, a tenth of them in `inactive_nodes`."""
    rows = [
        (key, f"node {key[:6]}", "repeater", 52.5, 13.4, "2026-11-01T00:00:00Z", "2026-01-01", 7)
        for key in keys(nodes, seed)
    ]
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = wal")
        tables = {"nodes": rows[nodes // 10 :], "inactive_nodes": rows[: nodes // 10]}
        for table, part in tables.items():
            connection.execute(_SCHEMA.format(table=table))
            connection.executemany(
                f"INSERT INTO {table} (public_key, name, role, lat, lon, last_seen, first_seen,"
                " advert_count) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                part,
            )


def series(nodes: int, count: int) -> Iterator[dict[str, Status]]:
    """Yield `count` states of the mesh; each changes about every hundredth node."""
    source = random.Random(SEED + 1)
    changing = names = keys(nodes, SEED)
    statuses: dict[str, Status] = {}
    for _ in range(count):
        statuses |= {key: source.choices(_STATUSES, _WEIGHTS)[0] for key in changing}
        yield statuses
        changing = source.sample(names, max(1, nodes // 100))


def publish(database: Path, nodes: int, count: int) -> None:
    """Publish one snapshot per line on standard input; print the monotonic time of each rename.

    Each snapshot is first written in full in another directory, so that the rename alone is timed.
    """
    path, staging = snapshot_path(database), database.parent / "staging"
    for _, statuses in zip(sys.stdin, series(nodes, count), strict=False):
        snapshot = Snapshot(tuple(Entry(key, *status) for key, status in statuses.items()))
        write_snapshot(database, snapshot, snapshot_dir=staging)
        renamed_at = time.monotonic_ns()
        os.replace(staging / path.name, path)
        print(renamed_at, flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    publish(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
