"""`Trigger`: the host says "sync now"."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Trigger:
    """Asks running bridges for a sync: `run(settings, trigger=trigger)`, `trigger.sync_now()`."""

    def __init__(self) -> None:
        self._requests: list[Callable[[], None]] = []

    def sync_now(self) -> None:
        """Have every bridge with this trigger sync and compare at once; from any thread.

        A sync costs a comparison with the database; calls within `debounce` of one merge into one
        more. Does not wait: what comes of it goes to `on_result`, with the reason `request`. A
        bridge that does not run yet syncs when it starts.
        """
        for request in tuple(self._requests):
            request()

    @contextlib.contextmanager
    def connected(self, request: Callable[[], None]) -> Iterator[None]:
        """Have `sync_now` call `request` for as long as the context lasts."""
        self._requests.append(request)
        try:
            yield
        finally:
            self._requests.remove(request)
