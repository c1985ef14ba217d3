"""SIGTERM and SIGINT for the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    import anyio

logger = logging.getLogger("mbcap_watch")

# A stop takes half a second. What has not ended after four hangs in the kernel, on a mount whose
# server is gone. The process ends without it, and nothing is lost.
_STOP_SECONDS: Final = 4.0


class Stop:
    """SIGTERM, SIGINT and `also` end the program cleanly, whenever and however often they come.

    The handlers stay until the process has ended: asyncio's own would be gone while it closes.
    """

    def __init__(self, *also: signal.Signals) -> None:
        self._cancel: Callable[[], object] | None = None
        self._signum: int | None = None
        self._hook: Callable[[], object] | None = None
        for signum in (signal.SIGTERM, signal.SIGINT, *also):
            signal.signal(signum, self._handle)

    def on_stop(self, hook: Callable[[], object]) -> None:
        """Have `hook` called when a signal comes; it must not block."""
        self._hook = hook

    def cancel_on_signal(self, scope: anyio.CancelScope) -> None:
        """Have a signal cancel `scope`; one that came before cancels it now."""
        loop = asyncio.get_running_loop()
        self._cancel = lambda: loop.call_soon_threadsafe(scope.cancel)
        if self._signum is not None:
            scope.cancel()

    def cancel(self) -> None:
        """Cancel the scope; from any thread, and from a signal handler."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended already
            if self._cancel is not None:
                self._cancel()

    def ignore_more(self) -> None:
        """Ignore signals: the interpreter removes handlers while it ends, but leaves SIG_IGN."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self._signum is not None:
            return
        self._signum = signum
        last_resort = threading.Timer(_STOP_SECONDS, os._exit, [0])
        last_resort.daemon = True
        with contextlib.suppress(RuntimeError):  # there is no thread for it
            last_resort.start()
        self.cancel()
        if self._hook is not None:
            self._hook()
        logger.info("stopping on %s", signal.Signals(signum).name)
