"""Signals while modules are loaded. At any other moment: `campaigns/signals.py`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from processes import MBCAP_WATCH
from support import DEADLINE, wait_until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.system]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("module", ["mbcap_watch.cli.app", "click", "mbcap_watch.cli.signals"])
def test_a_signal_while_this_module_is_loaded(
    database: Path, module: str, signum: signal.Signals
) -> None:
    script = f"""if True:
        import importlib.metadata, os, sys
        class Finder:
            def find_spec(name, path, target=None):
                if name == {module!r}:
                    os.kill(os.getpid(), {int(signum)})
        sys.meta_path.insert(0, Finder)
        (entry,) = importlib.metadata.entry_points(group="console_scripts", name="mbcap-watch")
        entry.load()()
    """
    command = [sys.executable, "-c", script, "run", "--database", str(database)]
    done = subprocess.run(command, capture_output=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_other_commands_are_interrupted_as_ever(
    database: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    """A script that calls them learns of it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = [*MBCAP_WATCH, "publish", str(fifo), "--database", str(database)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:

            def ends() -> bool:
                process.send_signal(signum)  # one that comes just before a read waits for the next
                return process.poll() is not None

            with open(fifo, "wb"):  # returns once the command reads from it
                wait_until(ends, "the end")
            assert process.returncode != 0
        finally:
            process.kill()
