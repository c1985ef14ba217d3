"""asyncio, and only asyncio; and work that a cancellation may not tear apart."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from mbcap_watch.errors import EventLoopError

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


async def uncancelled(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` as a task of its own, to its end, whatever happens to the caller.

    A cancelled caller waits until the work has ended, and only then goes down. Native
    cancellation (`task.cancel()`, `asyncio.timeout`, Ctrl-C under `asyncio.run`) and anyio's
    cancel scopes are both kept away from the work: a shielded scope alone would not stop the
    native kind, and without a shield anyio would cancel the wait again on every turn of the loop.

    Raises:
        asyncio.CancelledError: the caller was cancelled; the work has ended.

    """
    task = asyncio.get_running_loop().create_task(work)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError as exc:
        cancelled = exc
        with anyio.CancelScope(shield=True):
            while not task.done():
                try:
                    await asyncio.wait([task])
                except asyncio.CancelledError as again:
                    # Behind the shield only a native cancellation arrives, and that one must be
                    # what goes on: an anyio scope would swallow its own.
                    cancelled = again
        if not task.cancelled():
            task.exception()  # looked at; the caller is leaving and has no use for it
        raise cancelled from None
    return task.result()


def require_asyncio() -> asyncio.AbstractEventLoop:
    """Return the running loop.

    Raises:
        EventLoopError: there is none; this is trio, or no async code at all.

    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError as exc:
        raise EventLoopError(
            "mbcap_watch runs on asyncio only, because aiosqlite does; under trio, start it in a"
            " thread of its own with asyncio.run"
        ) from exc
