"""1,000 renames within a second, and 10,000 as fast as another process can.

How often `mbcap-watch run` syncs, and how long after the last rename a third connection sees the
last state, which comes at no other time. 2,400 entries, 24 of them changing.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Final

from benchmarks.lab import LAST, Site, Witness
from benchmarks.processes import Helper, ours, running
from benchmarks.report import Report, Row, at_most

if TYPE_CHECKING:
    from pathlib import Path

_BURSTS: Final = ((1_000, 1.0, 15), (10_000, 0.0, 50))


def run(root: Path, *, quick: bool) -> Report:
    """Measure both bursts, in turns."""
    site = Site(root, "site", 2_400, 24)
    syncs: dict[int, list[int]] = {count: [] for count, _, _ in _BURSTS}
    lasts: dict[int, list[float]] = {count: [] for count, _, _ in _BURSTS}
    took: dict[int, list[float]] = {count: [] for count, _, _ in _BURSTS}
    witness = Witness(site)
    with running(ours(site)) as process, Helper("publisher") as publisher:
        for _ in range(1 if quick else 7):
            for count, seconds, _ in _BURSTS:
                site.publish(0)
                witness.wait(0)
                time.sleep(0.5)
                before = len(process.lines)
                request = {"masters": site.masters(), "target": str(site.target)}
                first, last = publisher.ask({**request, "count": count, "seconds": seconds})
                seen = witness.wait(LAST)
                time.sleep(1.0)
                syncs[count].append(len(process.lines) - before)
                lasts[count].append((seen - last) / 1e9)
                took[count].append((last - first) / 1e9)
    rows = []
    for count, _, limit in _BURSTS:
        what = f"{count:,} renames in {statistics.median(took[count]):.2f} s"
        rows += [
            Row(
                what=f"{what}: syncs",
                ours=f"{statistics.median(syncs[count]):g} (at most {max(syncs[count])})",
                **at_most(max(syncs[count]), limit, digits=0, unit=""),
            ),
            Row(
                what=f"{what}: last rename → last state visible",
                ours=f"{statistics.median(lasts[count]):.3f} s",
                **at_most(max(lasts[count]), 0.3, digits=3, unit=" s"),
            ),
        ]
    return Report(rows, {"syncs": syncs, "last": lasts, "took": took})
