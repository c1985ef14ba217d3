"""`Heartbeat`: while `run` lasts, what it tells of itself is kept up to date.

The event loop takes a sample every few seconds; a loop that hangs gives no sign of life. A `Keeper`
that may block, on a disk, is called in a thread of its own: a disk that does not answer holds up
neither the bridge nor the others, and such a thread is left behind at the end.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from typing import TYPE_CHECKING, Final, Protocol

from mbcap_watch.errors import printable
from mbcap_watch.telemetry.runtime import Unfit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from mbcap_watch.telemetry.stats import Stats

logger = logging.getLogger("mbcap_watch")

# Between two samples. A beat of an idle bridge takes 0.4 ms of a processor; it would be 0.6 if the
# stats file were written in a thread. The first sample is from before the first look.
BEAT_SECONDS: Final = 3.0
_FIRST_SECONDS: Final = 1.0

# For how long the end waits for what is under way.
_END_SECONDS: Final = 1.0


class Keeper(Protocol):
    """Does something with the latest stats.

    Attributes:
        blocks: whether that may take long, and is to be done in a thread.
        every: seconds between two writes at least.
        path: what is written, for people.

    """

    @property
    def blocks(self) -> bool: ...  # noqa: D102
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
        self._kept = [_KeptInThread(k) if k.blocks else _Kept(k) for k in keepers]
        self._sample = sample

    def __enter__(self) -> Self:
        self._beat(asyncio.get_running_loop(), _FIRST_SECONDS)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._next.cancel()
        for kept in self._kept:
            kept.end()

    def _beat(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._next = loop.call_later(seconds, self._beat, loop, BEAT_SECONDS)
        stats, now = self._sample(), loop.time()
        for kept in self._kept:
            kept.offer(stats, now)


class _Kept:
    """Calls a keeper when it is time to, and logs what is wrong with it."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._due = float("-inf")
        self._problem: str | None = None

    def offer(self, stats: Stats, now: float) -> None:
        if now >= self._due:
            self._due = now + self._keeper.every
            self._write(stats)

    def end(self) -> None:
        self._keeper.remove()

    def _write(self, stats: Stats) -> None:
        try:
            self._keeper.write(stats)
        except Unfit as exc:
            self._note(str(exc))
        except OSError as exc:
            self._note(f"{self._keeper.path}: cannot be written: {exc.strerror or exc}")
        else:
            self._note(None)

    def _note(self, problem: str | None) -> None:
        """Log what is new about `problem`."""
        before, self._problem = self._problem, problem
        if problem is not None and problem != before:
            logger.warning("%s; the bridge works on without it", printable(problem))
        elif problem is None and before is not None:
            logger.info("%s: written again", printable(str(self._keeper.path)))


class _KeptInThread(_Kept):
    def __init__(self, keeper: Keeper) -> None:
        super().__init__(keeper)
        self._offers: queue.SimpleQueue[Stats | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mbcap-watch keeper", daemon=True)

    def offer(self, stats: Stats, now: float) -> None:
        if now < self._due or not self._offers.empty():  # what came before still waits
            return
        if self._thread.ident is None:
            try:
                self._thread.start()
            except RuntimeError as exc:  # the limit on threads is reached
                self._note(f"{self._keeper.path}: cannot be written: {exc}")
                return
        self._due = now + self._keeper.every
        self._offers.put(stats)

    def end(self) -> None:
        if self._thread.ident is not None:
            self._offers.put(None)
            self._thread.join(_END_SECONDS)

    def _run(self) -> None:
        while (stats := self._offers.get()) is not None:
            self._write(stats)
        self._keeper.remove()
