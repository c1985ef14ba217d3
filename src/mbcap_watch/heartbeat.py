"""`Heartbeat`: while `run` lasts, what it tells of itself is kept up to date.

The event loop takes a sample every two seconds; a loop that hangs gives no sign of life. What is
done with a sample happens in threads, one for each `Keeper`: a disk that does not answer holds up
neither the bridge nor the other keepers, and such a thread is left behind at the end.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from typing import TYPE_CHECKING, Final, Protocol

from mbcap_watch.errors import printable
from mbcap_watch.runtime import Unfit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from mbcap_watch.stats import Stats

logger = logging.getLogger("mbcap_watch")

# Between two samples; the first is followed sooner, because it is from before the first look.
BEAT_SECONDS: Final = 2.0
_FIRST_SECONDS: Final = 1.0

# For how long the end waits for what is under way.
_END_SECONDS: Final = 1.0


class Keeper(Protocol):
    """Does something with the latest stats, in a thread.

    Attributes:
        every: seconds between two writes at least.
        path: what is written, for people.

    """

    @property
    def every(self) -> float: ...  # noqa: D102
    @property
    def path(self) -> object: ...  # noqa: D102

    def write(self, stats: Stats) -> None:
        """Keep `stats`. May raise `OSError` and `Unfit`; it is called again."""

    def remove(self) -> None:
        """Leave nothing behind; raises nothing."""


class Heartbeat:
    """A context within which `keepers` are kept up to date; for an event loop.

    Args:
        keepers: whom to tell.
        sample: makes the stats; called on the event loop.

    """

    def __init__(self, keepers: Sequence[Keeper], sample: Callable[[], Stats]) -> None:
        self._threads = [_Thread(keeper) for keeper in keepers]
        self._sample = sample

    def __enter__(self) -> Self:
        for thread in self._threads:
            try:
                thread.start()
            except RuntimeError as exc:  # the limit on threads is reached
                logger.warning("%s: is not kept: %s", thread.keeper.path, exc)
        self._beat(asyncio.get_running_loop(), _FIRST_SECONDS)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._next.cancel()
        for thread in self._threads:
            thread.end()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_END_SECONDS)

    def _beat(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._next = loop.call_later(seconds, self._beat, loop, BEAT_SECONDS)
        stats, now = self._sample(), loop.time()
        for thread in self._threads:
            thread.offer(stats, now)


class _Thread(threading.Thread):
    def __init__(self, keeper: Keeper) -> None:
        super().__init__(name="mbcap-watch stats", daemon=True)
        self.keeper = keeper
        self._due = float("-inf")
        self._offers: queue.SimpleQueue[Stats | None] = queue.SimpleQueue()
        self._problem: str | None = None

    def offer(self, stats: Stats, now: float) -> None:
        """Have `stats` kept if it is time to, unless what came before still is."""
        if now >= self._due and self._offers.empty():
            self._due = now + self.keeper.every
            self._offers.put(stats)

    def end(self) -> None:
        self._offers.put(None)

    def run(self) -> None:
        while (stats := self._offers.get()) is not None:
            try:
                self.keeper.write(stats)
            except Unfit as exc:
                self._note(str(exc))
            except OSError as exc:
                self._note(f"{self.keeper.path}: cannot be written: {exc.strerror or exc}")
            else:
                self._note(None)
        self.keeper.remove()

    def _note(self, problem: str | None) -> None:
        """Log what is new about `problem`."""
        before, self._problem = self._problem, problem
        if problem is not None and problem != before:
            logger.warning("%s; the bridge works on without it", printable(problem))
        elif problem is None and before is not None:
            logger.info("%s: written again", printable(str(self.keeper.path)))
