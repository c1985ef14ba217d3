"""The bench itself: databases, snapshots, and a third connection that watches."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from typing import TYPE_CHECKING, Final

from mbcap_watch.cli import demo
from mbcap_watch.snapshot.codec import encode
from mbcap_watch.snapshot.files import SNAPSHOT_NAME, Entry, Snapshot, ensure_snapshot_dir

if TYPE_CHECKING:
    from pathlib import Path

SEED: Final = 6
LAST: Final = 2
"""The version that a burst ends with; 0 and 1 take turns."""
_STATES: Final = (("suspected", "path"), ("confirmed", "advert"), ("confirmed", "last"))
_SUP: Final = {"suspected": 1, "confirmed": 2}
_GIVE_UP_SECONDS: Final = 60.0


class Site:
    """A directory with a database as CoreScope makes it, and snapshots that take turns.

    Between two versions (0, 1 and `LAST`) exactly `moving` nodes differ, spread over both tables. A
    connection stays open and has rows in the WAL, as the ingestor's does: beside an empty WAL,
    ours would empty it after each write.

    Attributes:
        database: its path.
        target: where the snapshot belongs.
        moving: the keys that differ between two versions.

    """

    def __init__(self, root: Path, name: str, nodes: int, moving: int) -> None:
        directory = root / name
        directory.mkdir()
        self.database = directory / "meshcore.db"
        self.target = ensure_snapshot_dir(self.database) / SNAPSHOT_NAME
        template = root / f"template-{nodes}.db"
        if not template.exists():
            demo.create_database(template, nodes, SEED)
        shutil.copyfile(template, self.database)
        keys = demo.keys(nodes, SEED)
        self.moving = keys[:: nodes // moving][:moving] if moving else []
        self._masters = [directory / f"version-{version}.json" for version in range(3)]
        moves = set(self.moving)
        for version, master in enumerate(self._masters):
            entries = [
                Entry(key, *(_STATES[version if key in moves else at % 2]))
                for at, key in enumerate(keys)
            ]
            master.write_bytes(encode(Snapshot(tuple(entries), f"2026-11-22T00:00:0{version}Z")))
        self._keeper = sqlite3.connect(self.database, isolation_level=None)
        self._keeper.execute("CREATE TABLE kept (id INTEGER PRIMARY KEY)")
        self._keeper.execute("INSERT INTO kept VALUES (1)")

    @property
    def snapshot_bytes(self) -> int:
        """The size of a snapshot."""
        return self._masters[0].stat().st_size

    def stage(self, version: int) -> Path:
        """Return a file with that version, ready to be renamed; it was written long before.

        A hard link: nothing is left to be flushed, and the inode is another than the last one's.
        """
        staged = self.database.parent / "staged.json"
        staged.unlink(missing_ok=True)
        os.link(self._masters[version], staged)
        return staged

    def publish(self, version: int) -> None:
        """Rename that version into place, from this process."""
        os.replace(self.stage(version), self.target)

    def masters(self) -> list[str]:
        """Return the files of all versions."""
        return [str(master) for master in self._masters]

    def close(self) -> None:
        """Close the connection that was kept open."""
        self._keeper.close()


class Witness:
    """A third connection, read-only, in this process: sees when a version is in the database."""

    def __init__(self, site: Site) -> None:
        self._connection = sqlite3.connect(f"file:{site.database}?mode=ro", uri=True)
        self._database = site.database
        self._keys = site.moving[:900]
        keys = ", ".join("?" * len(self._keys))
        self._sql = " UNION ALL ".join(
            f"SELECT count(*) FROM {table} WHERE multibyte_sup = ? AND multibyte_evidence = ?"
            f" AND public_key IN ({keys})"
            for table in ("nodes", "inactive_nodes")
        )

    def sees(self, version: int) -> bool:
        """Whether every moving node has the values of that version."""
        status, evidence = _STATES[version]
        parameters = [_SUP[status], evidence, *self._keys] * 2
        found = self._connection.execute(self._sql, parameters).fetchall()
        return sum(int(count) for (count,) in found) == len(self._keys)

    def wait(self, version: int) -> int:
        """Return the monotonic time, in ns, at which that version was seen.

        `data_version` tells cheaply that somebody committed; it is asked every 0.1 ms, so that
        the watching leaves the processors to those that are measured.
        """
        deadline = time.monotonic() + _GIVE_UP_SECONDS
        known = None
        while time.monotonic() < deadline:
            [(now,)] = self._connection.execute("PRAGMA data_version").fetchall()
            if now != known and self.sees(version):
                return time.monotonic_ns()
            known = now
            time.sleep(0.00005)
        raise TimeoutError(f"version {version} did not arrive in {self._database}")
