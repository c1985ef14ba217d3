"""From the start of the process until `mbcap-watch run` is armed and has looked, 2,400 nodes.

Against `python -c "import sqlite3, asyncio"`, from its start to its end, in turns. Ours ends with
the first result on standard output, which comes after the watch is armed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from benchmarks.lab import Site
from benchmarks.processes import ours, running
from benchmarks.report import Report, Row, at_most, spread

if TYPE_CHECKING:
    from pathlib import Path


def run(root: Path, *, quick: bool) -> Report:
    """Measure both, in turns."""
    site = Site(root, "site", 2_400, 24)
    site.publish(0)
    mine: list[float] = []
    theirs: list[float] = []
    for number in range(-1, 5 if quick else 25):
        started = time.monotonic()
        with running(ours(site)):
            armed = time.monotonic() - started
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", "import sqlite3, asyncio"], check=True)
        if number >= 0:
            mine.append(armed)
            theirs.append(time.monotonic() - started)
    more = statistics.median(mine) - statistics.median(theirs)
    row = Row(
        what="start until armed and synced, 2,400 nodes",
        ours=spread(mine),
        reference=f"import sqlite3, asyncio: {spread(theirs)}",
        **at_most(more, 0.5, digits=3, unit=" s more"),
    )
    return Report([row], {"ours": mine, "theirs": theirs})
