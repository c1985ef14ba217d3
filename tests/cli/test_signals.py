"""`run` ends with exit code 0 on a signal, from the first instruction of ours on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import DEADLINE, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.system]

SCRIPT = Path(sys.executable).with_name("mbcap-watch")
COMMANDS = {"module": [sys.executable, "-m", "mbcap_watch"], "script": [str(SCRIPT)]}

# Loading everything takes 0.2 s on a quiet machine; by then, and later, each way is taken often.
LATEST = 0.4
TIMES = 30


def catches_sigterm(process: subprocess.Popen[str]) -> bool:
    """Return whether SIGTERM has a handler: the last thing that our first lines do (proc(5))."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) & 1 << (signal.SIGTERM - 1))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("way", COMMANDS)
def test_a_signal_at_any_moment_of_the_start(
    database: Path, way: str, signum: signal.Signals
) -> None:
    if way == "script" and not SCRIPT.exists():
        pytest.skip("the package is not installed")

    def end_after(delay: float) -> tuple[int, str]:
        with subprocess.Popen(
            [*COMMANDS[way], "run", "--database", str(database), "--log-level", "error"],
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                wait_until(lambda: process.poll() is not None or catches_sigterm(process))
                time.sleep(delay)
                process.send_signal(signum)
                _, said = process.communicate(timeout=DEADLINE)
                return process.returncode, said
            finally:
                process.kill()

    delays = [0.0, *(random.uniform(0, LATEST) for _ in range(TIMES))]
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(end_after, delays)) == {(0, "")}


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
    command = [*COMMANDS["module"], "publish", str(fifo), "--database", str(database)]
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
