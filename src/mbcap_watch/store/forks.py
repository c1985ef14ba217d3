"""A fork of the process waits until no connection of ours is open."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

# How long os.fork() waits for connections to be closed. A sync takes milliseconds, mostly.
_FORK_SECONDS: Final = 1.0


class _Forks:
    """Has os.fork() wait while a bridge has a connection open.

    A fork copies what SQLite knows of an open file, and no locks. Nothing in the child can use that
    database any more: it takes no locks, or finds it locked (sqlite.org/howtocorrupt.html, 2.6).
    """

    def __init__(self) -> None:
        self._changed, self._open = threading.Condition(), 0
        release = self._changed.release
        os.register_at_fork(before=self._begin, after_in_parent=release, after_in_child=self._end)

    def _begin(self) -> None:
        self._changed.acquire()
        self._changed.wait_for(lambda: self._open <= 0, _FORK_SECONDS)

    def _end(self) -> None:
        self._open = 0
        self._changed.release()

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Have forks wait within the context."""
        with self._changed:
            self._open += 1
        try:
            yield
        finally:
            with self._changed:
                self._open -= 1
                self._changed.notify_all()


forks: Final = _Forks()
