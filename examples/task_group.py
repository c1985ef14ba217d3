"""The least: an asyncio program that stays the only writer, with the bridge as one of its tasks.

python examples/task_group.py meshcore.db
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

import aiosqlite

from mbcap_watch import PersistResult, Settings, run


def on_result(result: PersistResult) -> None:
    """Say what came of a sync."""
    print(result.reason, result.outcome, result.changed, result.error or "", flush=True)


async def hear(connection: aiosqlite.Connection, lock: asyncio.Lock) -> None:
    """Write what the program itself has to write: one statement under the lock, in autocommit."""
    while True:
        async with lock:
            await connection.execute("UPDATE nodes SET last_seen = CURRENT_TIMESTAMP")
        await asyncio.sleep(1)


async def main(database: str) -> None:
    """Run both until one of them fails, or Ctrl-C."""
    async with aiosqlite.connect(database, isolation_level=None) as connection:
        lock = asyncio.Lock()
        bridge = run(Settings(database), connection=connection, lock=lock, on_result=on_result)
        async with asyncio.TaskGroup() as group:
            group.create_task(bridge)
            group.create_task(hear(connection, lock))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1]))
