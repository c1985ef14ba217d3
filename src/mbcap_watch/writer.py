"""Lines for a reader who may be slow, stopped or gone: whoever writes them never waits."""

from __future__ import annotations

import os
import queue
import select
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

# Kept for a slow reader: half a megabyte of ordinary lines.
MOST_LINES: Final = 1000


class LineWriter:
    """Writes lines to a descriptor, in order, from a thread of its own.

    A pipe that nobody reads blocks that thread alone. Once `MOST_LINES` wait there, more are
    dropped and counted until the reader has caught up; so there is one gap, and one place to tell
    of it. Its methods may be called from any thread, and from a Python signal handler.

    Args:
        descriptor: where to write; it stays open.
        on_lost: called with the number of lines that were lost, once there is a reader again. It
            returns the line to write in their place; None for no line. It must not block.
        on_error: called from the thread with every error of the descriptor.

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
        self._kept = 0
        self._lost = 0
        self._full = False
        self._thread: threading.Thread | None = None

    def write(self, line: str) -> None:
        """Have `line` written, or drop and count it."""
        with self._lock:
            self._full = self._full or self._kept >= MOST_LINES
            if self._full:
                self._lost += 1
            else:
                self._put(line)
        self._serve()

    def flush(self, seconds: float) -> int:
        """Wait for the reader, but no longer than `seconds`; return how many lines are unread."""
        done = threading.Event()
        self._queue.put(done)
        self._serve()
        done.wait(seconds)
        with self._lock:
            return self._kept + self._lost

    def _put(self, line: str) -> None:
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
            while _accepts(self._descriptor) and not self._queue.empty():
                self._take(self._queue.get())

    def _run(self) -> None:
        while True:
            self._take(self._queue.get())

    def _take(self, item: bytes | threading.Event) -> None:
        if isinstance(item, threading.Event):
            item.set()
            return
        written = self._write_out(item)
        with self._lock:
            self._kept -= 1
            self._lost += not written
            self._full = self._full and self._kept > 0
            if self._lost and written and not self._full:
                line = self._on_lost(self._lost)
                self._lost = 0
                if line is not None:
                    self._put(line)

    def _write_out(self, line: bytes) -> bool:
        rest = memoryview(line)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:  # whoever shares this pipe or terminal has made it so
                    select.select([], [self._descriptor], [])
        except OSError as exc:
            self._on_error(exc)
            return False
        return True


def _accepts(descriptor: int) -> bool:
    return bool(select.select([], [descriptor], [], 0)[1])
