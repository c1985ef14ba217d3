"""Loops that strike at a turn, and the ways in which a host cancels."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import uvloop

if TYPE_CHECKING:
    from collections.abc import Callable

    import anyio


def striking(base: Any) -> Any:
    """Make a loop that strikes after a number of callbacks: every resumption of a task is one."""

    class Loop(base):  # type: ignore[misc]  # any loop
        count = 0
        strike_at = -1
        strike: Callable[[], object]

        def call_soon(self, *args: Any, **options: Any) -> Any:
            self._tick()
            return super().call_soon(*args, **options)

        def call_soon_threadsafe(self, *args: Any, **options: Any) -> Any:
            self._tick()
            return super().call_soon_threadsafe(*args, **options)

        def _tick(self) -> None:
            self.count += 1
            if self.count == self.strike_at:
                # Threadsafe: the tick may come from a thread of the work.
                super().call_soon_threadsafe(self.strike)

    return Loop


LOOPS: Final = {"asyncio": striking(asyncio.SelectorEventLoop), "uvloop": striking(uvloop.Loop)}

# ------------------------------------------------------------------------------ ways to cancel


class Aim(NamedTuple):
    """What can be cancelled: the host's task, and what it has put around the call."""

    main: asyncio.Task[None]
    scope: anyio.CancelScope
    timeout: asyncio.Timeout


def native(aim: Aim) -> None:
    aim.main.cancel()


def again_and_again(aim: Aim) -> None:
    for delay in (0, 0.001, 0.002):
        aim.main.get_loop().call_later(delay, aim.main.cancel)


def by_scope(aim: Aim) -> None:
    aim.scope.cancel()


def by_timeout(aim: Aim) -> None:
    aim.timeout.reschedule(0)


def by_sigint(_: Aim) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def by_scope_and_native(aim: Aim) -> None:
    aim.scope.cancel()
    aim.main.cancel()


def everything(aim: Aim) -> None:
    """As `asyncio.run` does at the end, and after a second Ctrl-C."""
    for task in asyncio.all_tasks(aim.main.get_loop()):
        task.cancel()


Way: TypeAlias = "Callable[[Aim], None]"

# The seeds of a way take turns at its variants.
WAYS: Final[dict[str, list[Way]]] = {
    "native": [native, again_and_again, everything],
    "anyio": [by_scope, by_scope_and_native],
    "timeout": [by_timeout],
    "SIGINT": [by_sigint],
}

# What the host gets to see. Where it cancels in two ways, either will do.
SEEN: Final[dict[Way, set[type[BaseException | None]]]] = {
    by_scope: {type(None)},
    by_scope_and_native: {asyncio.CancelledError, type(None)},
    by_timeout: {TimeoutError},
    by_sigint: {KeyboardInterrupt},
}
