"""`top`: what `status` tells, live in the terminal, with the latest results and a line of lags.

`frame` is pure; `watch` has the effects: the terminal, the keys, the signals.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import select
import signal
import sys
import termios
import textwrap
import tty
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TypeAlias

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mbcap_watch.cli import output, views
from mbcap_watch.cli.signals import Stop
from mbcap_watch.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mbcap_watch.doctor.health import Health
    from mbcap_watch.telemetry.stats import HistoryEntry, Stats

Load: TypeAlias = "Callable[[], tuple[Stats | None, Health]]"

# Between two questions.
_EVERY: Final = 1.0

# The figures that are left in a window too small for all, and the results that it is to show.
_ESSENTIAL: Final = ("mode", "last sync", "last compared", "rows changed", "lag", "last error")
_LEAST_RESULTS: Final = 4

_PLAIN_WIDTH, _PLAIN_HEIGHT = 100, 40
_BARS: Final = "▁▂▃▄▅▆▇█"
_STYLES: Final = {"applied": "green", "unchanged": "dim", "no_snapshot": "yellow", "busy": "yellow"}


def frame(stats: Stats | None, health: Health, width: int, height: int) -> Group:
    """Return `height` lines at most, each of `width` at most.

    The verdict comes first, then what is wrong, the figures, and as many results as fit.
    """
    verdict = f"bold {'green' if health.healthy else 'red'}"
    lines = [Text("mbcap-watch: ").append(printable(health.verdict), style=verdict)]
    found = [
        Text(line, style=style)
        for text, style in views.marked(health)
        for line in textwrap.wrap(printable(text), max(width, 10), subsequent_indent="  ")
    ]
    lines += found[: max(2, height // 2)]
    if stats is not None:
        figures = [*views.rows(stats), ("recent lags", sparkline(stats.history, width // 2))]
        if len(lines) + len(figures) + _LEAST_RESULTS > height:
            figures = [each for each in figures if each[0] in (*_ESSENTIAL, "recent lags")]
        lines += [
            Text(f"{name:<{views.LABEL_WIDTH}}", style="dim").append(
                printable(value), style="not dim"
            )
            for name, value in figures
        ]
        room = height - len(lines) - 1
        if room > 0 and stats.history:
            lines.append(Text(_HEADING, style="bold"))
            lines += [_result(each) for each in stats.history[-room:]]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines[:height])


_HEADING: Final = (
    f"{'time (UTC)':<14}  {'outcome':<16}  {'reason':<7}  {'rows':>7}  {'lag':>11}  {'hold':>10}"
)


def _result(result: HistoryEntry) -> Text:
    when = format(datetime.fromtimestamp(result.at, UTC), "%m-%d %H:%M:%S")
    text = Text(f"{when}  ")
    text.append(f"{result.outcome:<16}", style=_STYLES.get(result.outcome, "red"))
    text.append(f"  {result.reason:<7}  {result.changed:>7,}")
    text.append(f"  {_ms(result.lag_ms):>11}  {_ms(result.hold_ms):>10}")
    text.append(f"  {result.times} times" if result.times > 1 else "")
    text.rstrip()
    return text


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f} ms"


def sparkline(history: Sequence[HistoryEntry], width: int) -> str:
    """Return the latest lags as bars, at most `width`, and what the lowest and highest stand for.

    On a logarithmic scale: one lag of a second may not make all others look alike.
    """
    lags = [max(each.lag_ms, 0.01) for each in history if each.lag_ms is not None][-max(width, 1) :]
    if not lags:
        return "none yet"
    low, high = math.log(min(lags)), math.log(max(lags))
    step = (high - low) / (len(_BARS) - 1) or 1.0
    bars = "".join(_BARS[round((math.log(lag) - low) / step)] for lag in lags)
    return f"{bars}  {_ms(min(lags))} to {_ms(max(lags))}"


def show(load: Load) -> None:
    """Show it until the user has seen enough; without a terminal, print it once."""
    if sys.stdin.isatty() and sys.stdout.isatty() and not Console().is_dumb_terminal:
        watch(load)
        return
    text = io.StringIO()
    Console(file=text, width=_PLAIN_WIDTH).print(frame(*load(), _PLAIN_WIDTH, _PLAIN_HEIGHT))
    for line in text.getvalue().rstrip().split("\n"):
        output.print_line(line)


def watch(load: Load) -> None:
    """Show it on the terminal until q, Ctrl-C, SIGTERM, or the terminal's end; then restore it."""
    wakened, waker = os.pipe()  # never closed: a signal may come until the process has ended
    Stop(signal.SIGHUP).on_stop(lambda: os.write(waker, b"q"))
    signal.signal(signal.SIGWINCH, lambda *_: os.write(waker, b"."))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # bars in Latin-1, say
    keyboard = sys.stdin.fileno()
    try:
        with _single_keys(keyboard):
            _draw(load, (wakened, keyboard))
    except OSError:
        # The terminal is gone, and what Python still holds for it is not to be tried again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _draw(load: Load, sources: tuple[int, int]) -> None:
    console = Console()
    with Live(
        console=console,
        screen=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as live:
        while True:
            size = os.get_terminal_size(1)  # rich would believe COLUMNS and LINES instead
            console.width, console.height = size.columns or 80, size.lines or 24
            shown = frame(*load(), console.width, console.height - 1)
            live.update(Group(shown, Text("q quits", style="dim", no_wrap=True)), refresh=True)
            readable, _, _ = select.select(sources, (), (), _EVERY)
            for source in readable:
                keys = os.read(source, 1024)
                if not keys or b"q" in keys.lower():
                    return


@contextlib.contextmanager
def _single_keys(keyboard: int) -> Iterator[None]:
    """Have keys come at once and unseen, and no Ctrl-Z, which would leave the shell this screen."""
    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    ours = termios.tcgetattr(keyboard)
    ours[6][termios.VSUSP] = b"\0"
    termios.tcsetattr(keyboard, termios.TCSANOW, ours)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(keyboard, termios.TCSANOW, before)
