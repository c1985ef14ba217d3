"""Persist CoreScope's multi-byte capability snapshots the moment they are published.

The hand-off (`Snapshot`, `Entry`, `read_snapshot`, `write_snapshot`) loads neither aiosqlite nor
watchdog; what needs them is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from mbcap_watch.errors import (
    DatabaseBusy,
    DatabaseError,
    DatabaseFailed,
    DatabaseMissing,
    EventLoopError,
    ForeignWal,
    MbcapWatchError,
    SchemaMissing,
    SettingsError,
    SnapshotError,
    SnapshotMalformed,
    SnapshotNotFound,
    SnapshotNotPublished,
    SnapshotRefused,
    SnapshotUnreadable,
    TransactionOpen,
)
from mbcap_watch.result import PersistResult, Timings, WatchState
from mbcap_watch.settings import Settings
from mbcap_watch.snapshot import (
    Entry,
    Snapshot,
    ensure_snapshot_dir,
    read_snapshot,
    snapshot_dir,
    snapshot_path,
    write_snapshot,
)
from mbcap_watch.trigger import Trigger

if TYPE_CHECKING:
    from mbcap_watch.host import apply_snapshot
    from mbcap_watch.service import persist_once, run
    from mbcap_watch.stream import Results, watch

__version__ = "0.1.0"

__all__ = [
    "DatabaseBusy",
    "DatabaseError",
    "DatabaseFailed",
    "DatabaseMissing",
    "Entry",
    "EventLoopError",
    "ForeignWal",
    "MbcapWatchError",
    "PersistResult",
    "Results",
    "SchemaMissing",
    "Settings",
    "SettingsError",
    "Snapshot",
    "SnapshotError",
    "SnapshotMalformed",
    "SnapshotNotFound",
    "SnapshotNotPublished",
    "SnapshotRefused",
    "SnapshotUnreadable",
    "Timings",
    "TransactionOpen",
    "Trigger",
    "WatchState",
    "apply_snapshot",
    "ensure_snapshot_dir",
    "persist_once",
    "read_snapshot",
    "run",
    "snapshot_dir",
    "snapshot_path",
    "watch",
    "write_snapshot",
]

_LAZY = {
    "Results": "mbcap_watch.stream",
    "apply_snapshot": "mbcap_watch.host",
    "persist_once": "mbcap_watch.service",
    "run": "mbcap_watch.service",
    "watch": "mbcap_watch.stream",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:  # PEP 562
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
