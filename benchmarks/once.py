"""`persist_once` in a process of its own, to see its memory.

`python -m benchmarks.once DATABASE` prints seconds, peak memory growth in bytes, and rows changed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import anyio

from mbcap_watch import Settings, persist_once


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def main() -> None:
    """Look once at an empty directory, to have everything loaded, then at the real one."""
    database = Path(sys.argv[1])
    settings = Settings(database, max_bytes="1GiB")
    anyio.run(persist_once, Settings(database, snapshot_dir=database.parent / "nowhere"))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    before = _status("VmHWM")
    started = time.perf_counter()
    result = anyio.run(persist_once, settings)
    seconds = time.perf_counter() - started
    answer = {
        "seconds": seconds,
        "growth": _status("VmHWM") - before,
        "changed": result.changed_active + result.changed_inactive,
    }
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
