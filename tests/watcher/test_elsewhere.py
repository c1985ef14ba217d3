"""Systems without inotify, and without /proc: macOS, a BSD. It polls there, and says so."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from mbcap_watch import snapshot_path
from processes import MBCAP_WATCH, daemon
from support import document, put, read_rows, wait_until

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
WITHOUT_PROC = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /proc && exec "$@"', "sh"]


def without_proc() -> list[str]:
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("hiding /proc takes root and unshare(1)")
    if subprocess.run([*WITHOUT_PROC, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    return WITHOUT_PROC


def follows_two_snapshots(database: Path, prefix: list[str], *options: str) -> str:
    """Run the daemon while two snapshots are published; return its log."""
    with daemon(database, "--poll-interval=50ms", *options, prefix=prefix) as process:
        for evidence in ("one", "two"):
            put(document(("aa11", "confirmed", evidence)), snapshot_path(database))
            row = ("nodes", "aa11", 2, evidence)
            wait_until(lambda row=row: row in read_rows(database), evidence)  # type: ignore[misc]
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
    command = [*prefix, *MBCAP_WATCH, "status", "--database", str(database)]
    with daemon(database, prefix=prefix):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("unknown\n")
    assert "/proc is not mounted" in done.stdout
