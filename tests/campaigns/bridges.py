"""Many bridges in one process and one loop: a program that `mishaps.py` runs.

It gets the settings of each bridge as JSON. It prints `NUMBER MODE` whenever a bridge goes another
way, and ends with standard input: then it prints which descriptors and threads
are left.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from mbcap_watch import Settings, run

if TYPE_CHECKING:
    from mbcap_watch import WatchState


def held() -> Counter[str]:
    """Return what the process has open, and its threads."""
    found = Counter(thread.name for thread in threading.enumerate())
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one with which they are listed
            found[os.readlink(f"/proc/self/fd/{descriptor}")] += 1
    return found


async def serve(all_settings: list[dict[str, Any]]) -> None:
    modes: dict[int, str] = {}

    def tell(number: int, state: WatchState) -> None:
        if modes.get(number) != state.mode:
            modes[number] = state.mode
            print(number, state.mode, flush=True)

    async with anyio.create_task_group() as group:
        for number, each in enumerate(all_settings):
            settings = Settings.from_mapping(each)
            group.start_soon(partial(run, settings, on_state=partial(tell, number)))
        await anyio.to_thread.run_sync(sys.stdin.read)
        group.cancel_scope.cancel()


def main() -> None:
    os.chdir("/")
    before = held()
    anyio.run(serve, json.loads(sys.argv[1]))
    deadline = time.monotonic() + 20
    while (left := held() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    print("left", dict(left), flush=True)


if __name__ == "__main__":
    main()
