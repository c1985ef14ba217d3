from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mbcap_watch import ensure_snapshot_dir, snapshot_path
from restores import BACKUP_PACKETS, make_packets, snapshot
from support import put

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def meshcore(tmp_path: Path) -> Path:
    """A database with a snapshot that was not applied yet."""
    database = make_packets(tmp_path / "meshcore.db", "live", 300)
    ensure_snapshot_dir(database)
    put(snapshot("first"), snapshot_path(database))
    return database


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    return make_packets(tmp_path / "backup.db", "backup", BACKUP_PACKETS["smaller"])
