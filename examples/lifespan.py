"""A web application with the bridge inside, for as long as it is served.

    uvicorn --app-dir examples lifespan:app

`lifespan` is what FastAPI and Starlette take: `FastAPI(lifespan=lifespan)`. `app` does the same
without either, as any ASGI server calls it. Both write through the application's own connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

import aiosqlite

from mbcap_watch import Settings, watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

DATABASE = os.environ.get("DB_PATH", "meshcore.db")


@contextlib.asynccontextmanager
async def lifespan(_: object) -> AsyncIterator[dict[str, Any]]:
    """Open the connection and run the bridge through it; what is yielded is the request's state."""
    async with aiosqlite.connect(DATABASE, isolation_level=None) as connection:
        lock = asyncio.Lock()
        async with watch(Settings(DATABASE), connection=connection, lock=lock) as bridge:
            yield {"connection": connection, "lock": lock, "bridge": bridge}


async def app(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Answer every request with how many nodes are confirmed."""
    if scope["type"] == "lifespan":
        await receive()
        async with lifespan(app) as state:
            scope["state"].update(state)
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "http":
        async with scope["state"]["lock"]:
            sql = "SELECT count(*) FROM nodes WHERE multibyte_sup = 2"
            [(confirmed,)] = await scope["state"]["connection"].execute_fetchall(sql)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d confirmed\n" % confirmed})
