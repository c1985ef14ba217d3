"""watchfiles with its defaults, and the straightforward apply.

`python -m benchmarks.contestants.watchfiles_loop DATABASE [poll]`; with `poll` it polls once a
second, which is for the idle benchmark.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from watchfiles import awatch

from benchmarks.contestants.straightforward import apply


async def main(database: Path, *, poll: bool) -> None:
    """Serve `database` until killed; say "ready" just before the watch is armed."""
    directory = database.parent / "mbcap-snapshot"
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    # None and 300 are the defaults.
    watch = awatch(directory, force_polling=poll or None, poll_delay_ms=1000 if poll else 300)
    async for changes in watch:
        if any(Path(path).name == "snapshot.json" for _, path in changes):
            await asyncio.to_thread(apply, database)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), poll="poll" in sys.argv[2:]))
