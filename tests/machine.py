"""What a test does to the machine: mounts, namespaces, users. It skips where that cannot be."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROOT = os.geteuid() == 0
NOBODY = 65534
as_root = pytest.mark.skipif(not ROOT, reason="needs root")


def _require(command: list[str]) -> list[str]:
    """Return the beginning of a command, if it can be run."""
    try:
        if subprocess.run([*command, "true"], check=False, capture_output=True).returncode == 0:
            return command
    except FileNotFoundError:
        pass
    pytest.skip(f"cannot do this here: {' '.join(command)}")


def unshared(script: str, *options: str) -> list[str]:
    """Return what runs a command in namespaces of its own, which `script` has changed."""
    if not ROOT:
        pytest.skip("needs root, to change mounts and limits")
    unshare = _require(["unshare", *(options or ["--mount"])])
    return [*unshare, "sh", "-ec", f'{script}; exec "$@"', "sh"]


def without_rights() -> list[str]:
    """Return what runs a command that the modes of files keep out: root passes all of them."""
    without = "--bounding-set=-dac_override,-dac_read_search"
    return _require(["setpriv", without, "--inh-caps=-all", "--"]) if ROOT else []


def as_nobody() -> list[str]:
    """Return what runs a command as another user."""
    runs = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    tried = [*runs, sys.executable, "-c", "import mbcap_watch"]
    if subprocess.run(tried, check=False, capture_output=True).returncode:
        pytest.skip("the interpreter is out of the other user's reach")
    return runs


@contextlib.contextmanager
def mounted(where: Path, *what: str) -> Iterator[None]:
    """Mount something, with these arguments of mount(8), for the block."""
    where.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *what, where], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr!r}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", where], check=True)
