"""`top` on a real terminal and off it; `plot` as a user calls it."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from mbcap_watch import Settings
from mbcap_watch.cli import top
from mbcap_watch.doctor import health
from mbcap_watch.results import PersistResult, Timings, WatchState
from mbcap_watch.telemetry.metrics import Metrics
from support import DEADLINE, offered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mbcap_watch.telemetry.stats import Stats

COMMAND = [sys.executable, "-m", "mbcap_watch"]
SHOWN, HIDDEN = re.escape(b"\x1b[?1049h"), re.escape(b"\x1b[?1049l")  # xterm's alternate screen
CURSOR = re.escape(b"\x1b[?25h")
COLOURS = re.compile(rb"\x1b\[[0-9;]*m")


def make_stats(settings: Settings, results: int = 12, error: str | None = None) -> Stats:
    metrics = Metrics(settings, version="1.2.3", pid=os.getpid())
    for number in range(results):
        metrics.on_result(PersistResult(outcome="applied", reason="rename", changed_active=number))
        metrics.on_timings(Timings(lag=0.002 * (number + 1), waits=(0.0,), holds=(0.001,)))
    if error is not None:
        metrics.on_result(PersistResult(outcome="malformed", reason="retry", error=error))
    metrics.on_state(WatchState(mode="inotify", why="ext4", last_sync=time.time()))
    return metrics.snapshot(time.time())


def drawn(stats: Stats | None, width: int, height: int) -> list[str]:
    found = health.Health() if stats is None else health.judge(stats)
    text = io.StringIO()
    Console(file=text, width=width).print(top.frame(stats, found, width, height))
    return text.getvalue().splitlines()


@pytest.mark.parametrize("height", [1, 5, 12, 24, 100])
@pytest.mark.parametrize("width", [1, 20, 80, 200])
def test_a_frame_fits_into_its_window(width: int, height: int) -> None:
    lines = drawn(make_stats(Settings("m.db"), error="torn " * 100), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_the_latest_results_scroll_and_the_figures_give_way() -> None:
    stats = make_stats(Settings("m.db"))
    large, small = drawn(stats, 80, 40), drawn(stats, 80, 14)
    assert re.search(r"applied +rename +11 +24.0 ms +1.0 ms$", large[-1])
    assert len([line for line in large if " applied  " in line]) == 12
    assert any(line.startswith("process") for line in large)
    assert small[-1] == large[-1]
    assert not any(line.startswith("process") for line in small)
    assert any(line.startswith("last sync") for line in small)


def test_what_is_wrong_is_named_with_the_remedy() -> None:
    screen = "\n".join(drawn(make_stats(Settings("m.db"), error="a \x1b]0;torn\x07 file"), 80, 40))
    assert "running, unhealthy" in screen
    assert "a \\x1b]0;torn\\x07 file" in screen
    assert "→" in screen
    assert "\x1b" not in screen


def test_a_line_of_lags() -> None:
    history = make_stats(Settings("m.db"), results=8).history
    assert top.sparkline(history, 40) == "▁▃▅▆▆▇██  2.0 ms to 16.0 ms"
    assert top.sparkline(history, 2) == "▁█  14.0 ms to 16.0 ms"
    assert top.sparkline(history[:1], 40) == "▁  2.0 ms to 2.0 ms"
    assert top.sparkline((), 40) == "none yet"


# ------------------------------------------------------------------------------ on a terminal


class Bridge:
    """The control socket of a bridge, without the bridge."""

    def __init__(self, directory: Path) -> None:
        self.settings = Settings(directory / "meshcore.db")
        self.settings.database.touch()
        self.options = ["--database", str(self.settings.database)]
        self.environ = {**os.environ, "RUNTIME_DIRECTORY": str(directory), "TERM": "xterm"}
        self._running = contextlib.ExitStack()

    def start(self) -> None:
        stats = make_stats(self.settings)
        self._running.enter_context(offered(self.settings, self.environ, lambda: stats))

    def stop(self) -> None:
        self._running.close()

    def ask(self, command: str, *options: str, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*COMMAND, command, *self.options, *options],
            env=self.environ,
            capture_output=True,
            check=False,
            **kwargs,
        )


@pytest.fixture
def bridge(tmp_path: Path) -> Iterator[Bridge]:
    bridge = Bridge(tmp_path)
    yield bridge
    bridge.stop()


class Terminal:
    """A pseudo-terminal, and `top` in a session of its own on it."""

    def __init__(self, bridge: Bridge) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(80, 40)
        self.before = termios.tcgetattr(self.slave)
        self.output = b""
        # The first terminal that the leader of a session opens becomes that of the session.
        command = shlex.join([*COMMAND, "top", *bridge.options])
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {command} <>{os.ttyname(self.slave)} >&0 2>&0"],
            env=bridge.environ,
            start_new_session=True,
        )

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def wait_for(self, pattern: bytes) -> bytes:
        """Wait for output that matches, and return it with all before it; the rest is kept."""
        deadline = time.monotonic() + DEADLINE
        while not (match := re.search(pattern, self.output, re.DOTALL)):
            left = deadline - time.monotonic()
            assert select.select([self.master], [], [], max(left, 0))[0], (pattern, self.output)
            self.output = COLOURS.sub(b"", self.output + os.read(self.master, 65536))
        before, self.output = self.output[: match.end()], self.output[match.end() :]
        return before

    def wait_for_end(self) -> None:
        """It ends by itself, with the terminal as it was."""
        self.wait_for(CURSOR + b".*" + HIDDEN)
        assert self.process.wait(DEADLINE) == 0
        assert termios.tcgetattr(self.slave) == self.before


@pytest.fixture
def terminal(bridge: Bridge) -> Iterator[Terminal]:
    terminal = Terminal(bridge)
    with terminal.process:
        yield terminal
        terminal.process.kill()
    for descriptor in (terminal.master, terminal.slave):
        with contextlib.suppress(OSError):  # the test has closed it
            os.close(descriptor)


def test_it_follows_a_bridge_that_comes_and_goes(terminal: Terminal, bridge: Bridge) -> None:
    terminal.wait_for(SHOWN)
    terminal.wait_for(b"not running")
    bridge.start()
    terminal.wait_for(rb"running.*inotify.*applied +rename +11 +24.0 ms")
    bridge.stop()
    terminal.wait_for(b"not running")
    terminal.type(b"x\x1a\x1b[A")  # neither other keys nor Ctrl-Z matter
    terminal.type(b"q")
    terminal.wait_for_end()


def test_it_adapts_to_its_window(terminal: Terminal, bridge: Bridge) -> None:
    bridge.start()
    terminal.wait_for(b"process.*q quits")
    terminal.resize(40, 12)
    terminal.wait_for(b"\x1b\\[H")
    screen = terminal.wait_for(b"q quits[^\n]*")
    while b"process" in screen:  # drawn before it was told
        screen = terminal.wait_for(b"q quits[^\n]*")
    assert screen.count(b"\n") <= 12
    terminal.type(b"q")
    terminal.wait_for_end()


def ctrl_c(terminal: Terminal) -> None:
    terminal.type(b"\x03")


def sigterm(terminal: Terminal) -> None:
    terminal.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("end", [ctrl_c, sigterm])
def test_it_ends_cleanly(terminal: Terminal, end: Callable[[Terminal], None]) -> None:
    terminal.wait_for(b"q quits")
    end(terminal)
    terminal.wait_for_end()


def test_it_ends_with_its_terminal(terminal: Terminal) -> None:
    terminal.wait_for(b"q quits")
    os.close(terminal.slave)
    os.close(terminal.master)
    assert terminal.process.wait(DEADLINE) == 0


# ------------------------------------------------------------------------------ without one


def test_without_a_terminal_it_prints_once(bridge: Bridge) -> None:
    bridge.start()
    done = bridge.ask("top")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"running" in done.stdout
    assert b"\x1b" not in done.stdout
    assert done.stdout.count(b"rename") == 13  # twelve results, and the figures
    assert b"\nprocess " in done.stdout


def test_plot_draws_to_standard_output_and_to_a_file(bridge: Bridge, tmp_path: Path) -> None:
    bridge.start()
    printed = bridge.ask("plot").stdout
    done = bridge.ask("plot", "-o", str(tmp_path / "out.svg"))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (tmp_path / "out.svg").read_bytes() == printed
    assert ET.fromstring(printed).tag == "{http://www.w3.org/2000/svg}svg"


def test_plot_has_nothing_to_draw_or_nowhere_to(bridge: Bridge, tmp_path: Path) -> None:
    done = bridge.ask("plot")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"no mbcap-watch runs" in done.stderr
    bridge.start()
    done = bridge.ask("plot", "-o", str(tmp_path / "missing" / "out.svg"))
    assert done.returncode == 1
    assert b"cannot be written" in done.stderr
