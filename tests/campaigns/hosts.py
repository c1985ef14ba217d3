"""Hosts, and what they call."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from mbcap_watch import apply_snapshot, persist_once, read_snapshot, run, watch

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    import aiosqlite

    from campaigns.published import Published
    from mbcap_watch import PersistResult, Settings


class Enough(Exception):
    """The host has heard enough, and ends the call."""


class Host:
    """A program that calls us, with a connection of its own if the call needs one."""

    def __init__(self, settings: Settings, published: Published) -> None:
        self.settings = settings
        self.published = published
        self.lock = asyncio.Lock()
        self.connection: aiosqlite.Connection | None = None
        self.is_over = False
        self.last: PersistResult | None = None

    def hear(self, result: PersistResult) -> None:
        """Publish again; raise `Enough` once it is over."""
        self.last = result
        if self.is_over:
            raise Enough
        self.published.publish()

    @property
    def lent(self) -> aiosqlite.Connection:
        assert self.connection is not None
        return self.connection


async def calls_persist_once(host: Host) -> None:
    host.hear(await persist_once(host.settings))


async def calls_apply_snapshot(host: Host) -> None:
    snapshot = read_snapshot(host.settings.database)
    batch = host.settings.batch_rows
    host.hear(await apply_snapshot(host.lent, snapshot, lock=host.lock, batch_rows=batch))


async def calls_run(host: Host) -> None:
    await run(host.settings, on_result=host.hear)


async def calls_run_with_connection(host: Host) -> None:
    await run(host.settings, on_result=host.hear, connection=host.lent, lock=host.lock)


async def calls_watch(host: Host) -> None:
    async with watch(host.settings) as results:
        async for result in results:
            host.hear(result)


Call: TypeAlias = "Callable[[Host], Coroutine[Any, Any, None]]"
CALLS: Final[list[Call]] = [
    calls_persist_once,
    calls_apply_snapshot,
    calls_run,
    calls_run_with_connection,
    calls_watch,
]
LENDING: Final = {calls_apply_snapshot, calls_run_with_connection}
