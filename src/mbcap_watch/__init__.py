"""Persist CoreScope's multi-byte capability snapshots the moment they are published.

Every name is loaded when it is first asked for, so importing the package costs next to nothing.
The hand-off (`Snapshot`, `Entry`, `read_snapshot`, `write_snapshot`) loads neither aiosqlite nor
watchdog.
"""

TYPE_CHECKING = False  # `typing` alone would take longer to load than all of this
if TYPE_CHECKING:
    from mbcap_watch.bridge.host import apply_snapshot
    from mbcap_watch.bridge.run import Trigger, persist_once, run
    from mbcap_watch.bridge.service import Results, watch
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
    from mbcap_watch.results import PersistResult, Timings, WatchState
    from mbcap_watch.settings import Settings
    from mbcap_watch.snapshot.files import (
        Entry,
        Snapshot,
        ensure_snapshot_dir,
        read_snapshot,
        snapshot_dir,
        snapshot_path,
        write_snapshot,
    )
    from mbcap_watch.telemetry.control import Control

__version__ = "0.1.0"

__all__ = [
    "Control",
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

_MODULES = {
    "bridge.host": ["apply_snapshot"],
    "results": ["PersistResult", "Timings", "WatchState"],
    "bridge.run": ["Trigger", "persist_once", "run"],
    "settings": ["Settings"],
    "snapshot.files": [
        *("Entry", "Snapshot", "ensure_snapshot_dir", "read_snapshot"),
        *("snapshot_dir", "snapshot_path", "write_snapshot"),
    ],
    "bridge.service": ["Results", "watch"],
    "telemetry.control": ["Control"],
}  # all others are errors


def __getattr__(name: str) -> object:  # PEP 562
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # noqa: PLC0415 - only a first use needs it
    import logging  # noqa: PLC0415 - as above

    logger = logging.getLogger(__name__)
    if not logger.handlers:  # a library is silent until its host configures logging
        logger.addHandler(logging.NullHandler())
    home = next((module for module, names in _MODULES.items() if name in names), "errors")
    value: object = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
