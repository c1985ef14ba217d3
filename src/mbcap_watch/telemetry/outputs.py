"""What the daemon writes to: whether it works, and lines for a reader who may be slow or gone."""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
import time
from typing import TYPE_CHECKING, Final

from mbcap_watch.errors import printable
from mbcap_watch.telemetry.stats import Output

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("mbcap_watch")

# Kept for a slow reader: half a megabyte of ordinary lines.
MOST_LINES: Final = 1000

# A line that waits longer than this has no reader.
_UNREAD_SECONDS: Final = 5.0

# For how long the end waits for whoever reads.
_FLUSH_SECONDS: Final = 0.5

_PROBLEM_LENGTH: Final = 500


class OutputState:
    """Whether an output works. A change of that is logged, if there are words for it.

    `fails` makes the line for a problem; `works` is the line once it works again.
    """

    def __init__(self, fails: Callable[[str], str] | None = None, works: str = "") -> None:
        self._fails, self._works = fails, works
        self._problem: str | None = None
        self._good: float | None = None

    def update(self, problem: object = None) -> None:
        """Tell what is wrong with it now; None if it has just worked."""
        before = self._problem
        if problem is None:
            self._problem, self._good = None, time.monotonic()
            if before is not None and self._works:
                logger.info("%s", self._works)
        else:
            said = problem.strerror if isinstance(problem, OSError) else None
            self._problem = printable(said or str(problem), _PROBLEM_LENGTH)
            if self._problem != before and self._fails is not None:
                logger.warning("%s", self._fails(self._problem))

    def output(self) -> Output:
        """Return the state, for the stats."""
        now = time.time() - time.monotonic()
        return Output(self._problem, None if self._good is None else round(now + self._good, 3))


class LineWriter:
    """Writes lines to a descriptor, in order, from a thread of its own; no caller waits.

    A pipe that nobody reads blocks that thread alone. Once `MOST_LINES` wait there, more are
    dropped and counted until the reader has caught up: there is one gap, and one line tells of
    it. Its methods may be called from any thread, and from a Python signal handler.

    Once there is a reader again, `on_lost` is called with the number of lines that were lost, and
    may return a line to write in their place. `on_error` is called from the thread with every error
    of the descriptor. Neither may block.
    """

    def __init__(
        self,
        descriptor: int,
        on_lost: Callable[[int], str | None],
        on_error: Callable[[OSError], object] = lambda _: None,
    ) -> None:
        self._descriptor = descriptor
        self._on_lost = on_lost
        self._on_error = on_error
        self._queue: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a signal handler may run while its own thread holds it
        self._kept = self._lost = 0
        self._full = False
        self._since = 0.0  # since when the oldest line has waited
        self._state = OutputState()
        self._thread: threading.Thread | None = None

    def output(self) -> Output:
        """Return whether somebody reads the lines, and when one was last written."""
        with self._lock:
            output, kept, lost = self._state.output(), self._kept, self._lost
            unread = kept > 0 and time.monotonic() - self._since > _UNREAD_SECONDS
        if output.problem is None and (unread or lost):
            problem = f"nobody reads it: {kept} lines wait, {lost} are lost"
            return Output(problem, output.last_good)
        return output

    def write(self, line: str) -> None:
        """Have `line` written, or drop and count it."""
        with self._lock:
            self._full = self._full or self._kept >= MOST_LINES
            if self._full:
                self._lost += 1
            else:
                self._put(line)
        self._serve()

    def flush(self, seconds: float = _FLUSH_SECONDS) -> int:
        """Wait for the reader, but no longer than `seconds`; return how many lines are unread."""
        done = threading.Event()
        self._queue.put(done)
        self._serve()
        done.wait(seconds)
        with self._lock:
            return self._kept + self._lost

    def _put(self, line: str) -> None:
        if not self._kept:
            self._since = time.monotonic()
        self._kept += 1
        self._queue.put(line.encode("utf-8", "backslashreplace") + b"\n")

    def _serve(self) -> None:
        """Have a thread that writes, or write here what does not block."""
        with self._lock:
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._run, name="mbcap-watch log", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the limit on threads is reached; the next line tries again
                self._thread = None
        if self._thread is None:
            while select.select([], [self._descriptor], [], 0)[1] and not self._queue.empty():
                self._take(self._queue.get())

    def _run(self) -> None:
        while True:
            self._take(self._queue.get())

    def _take(self, item: bytes | threading.Event) -> None:
        if isinstance(item, threading.Event):
            item.set()
            return
        error = self._write_out(item)
        with self._lock:
            self._kept -= 1
            self._since = time.monotonic()
            self._state.update(error)
            self._full = self._full and self._kept > 0
            if error is not None:
                self._lost += 1
                return
            if self._lost and not self._full:
                line = self._on_lost(self._lost)
                self._lost = 0
                if line is not None:
                    self._put(line)

    def _write_out(self, line: bytes) -> OSError | None:
        """Return what kept the line from being written."""
        rest = memoryview(line)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:  # whoever shares this pipe or terminal has made it so
                    select.select([], [self._descriptor], [])
        except OSError as exc:
            self._on_error(exc)
            return exc
        return None
