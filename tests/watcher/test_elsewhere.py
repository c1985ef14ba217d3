"""Systems without inotify, and without /proc: macOS, a BSD. It polls there, and says so."""

from __future__ import annotations

import signal
from functools import partial
from typing import TYPE_CHECKING

import pytest

from machine import unshared
from mbcap_watch import snapshot_path
from processes import call, daemon
from support import document, has_landed, put, wait_until

if TYPE_CHECKING:
    from pathlib import Path

# What Python loads at its start: then the C library has no inotify. The kernel has no O_PATH, and
# does not say who holds a lock.
HIDE = """
import ctypes, fcntl, os

class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name.startswith("inotify"):
            raise AttributeError(name)
        return super().__getattr__(name)

ctypes.CDLL = Library
del os.O_PATH, fcntl.F_OFD_GETLK
"""


def without_proc() -> list[str]:
    return unshared("mount -t tmpfs tmpfs /proc")


def follows_two_snapshots(database: Path, prefix: list[str], *options: str) -> str:
    """Run the daemon while two snapshots are published; return its log."""
    with daemon(database, "--poll-interval=50ms", *options, prefix=prefix) as process:
        for evidence in ("one", "two"):
            put(document(("aa11", "confirmed", evidence)), snapshot_path(database))
            wait_until(partial(has_landed, database, evidence), evidence)
        assert process.end(signal.SIGTERM) == 0
        return process.said


@pytest.mark.parametrize("mode", ["auto", "inotify"])
def test_without_inotify(database: Path, tmp_path: Path, mode: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    said = follows_two_snapshots(database, ["env", f"PYTHONPATH={tmp_path}"], f"--mode={mode}")
    assert "watching by poll: this system has no inotify" in said


@pytest.mark.system
def test_with_neither_inotify_nor_proc(database: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    prefix = [*without_proc(), "env", f"PYTHONPATH={tmp_path}"]
    assert "this system has no inotify" in follows_two_snapshots(database, prefix)


@pytest.mark.system
@pytest.mark.parametrize("mode", ["auto", "inotify"])
def test_without_proc(database: Path, mode: str) -> None:
    said = follows_two_snapshots(database, without_proc(), f"--mode={mode}")
    assert "watching by poll: " in said
    assert "cannot ask this process: /proc is not mounted" in said


@pytest.mark.system
def test_without_proc_status_says_that_it_cannot_know(database: Path) -> None:
    prefix = without_proc()
    with daemon(database, prefix=prefix):
        done = call("status", "--database", database, prefix=prefix)
    assert done.returncode == 1
    assert done.stdout.startswith("unknown\n")
    assert "/proc is not mounted" in done.stdout
