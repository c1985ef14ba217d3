"""1,000,000 entries against our own 100,000: time, and peak memory growth against the file's size.

Each sync is a `persist_once` in a fresh process (`once.py`); growth is VmHWM after the sync less
VmHWM before it, with all modules loaded. The sizes take turns; all rows changed, and none.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final

from benchmarks.lab import Site
from benchmarks.processes import Helper
from benchmarks.report import Report, Row, at_most, spread

if TYPE_CHECKING:
    from pathlib import Path

SMALL: Final = 100_000
LARGE: Final = 1_000_000
QUICK_LARGE: Final = 300_000


def run(root: Path, *, quick: bool) -> Report:
    """Measure both sizes; a quick run takes 300,000 for the large one."""
    large = QUICK_LARGE if quick else LARGE
    factor = large / SMALL
    rows: list[Row] = []
    samples: dict[str, object] = {}
    sites = {nodes: Site(root, str(nodes), nodes, nodes) for nodes in (SMALL, large)}
    for changing in (True, False):
        case = "all rows changed" if changing else "nothing changed"
        seconds: dict[int, list[float]] = {nodes: [] for nodes in sites}
        growth: dict[int, list[float]] = {nodes: [] for nodes in sites}
        for number in range(1 if quick else 3):
            for nodes, site in sites.items():
                if changing:
                    site.publish(number % 2)
                with Helper("once", site.database) as process:
                    answer = process.receive()
                assert answer["changed"] == (nodes if changing else 0), answer
                seconds[nodes].append(answer["seconds"])
                growth[nodes].append(answer["growth"])
        samples[case] = {"seconds": seconds, "growth": growth}
        medians = {nodes: statistics.median(values) for nodes, values in seconds.items()}
        peak = max(growth[large])
        size = sites[large].snapshot_bytes
        rows += [
            Row(
                what=f"{large:,} entries, {case}: time",
                ours=spread(seconds[large], scale=1, unit="s"),
                reference=f"our own {SMALL:,}: {spread(seconds[SMALL])}",
                **at_most(medians[large] / medians[SMALL], 1.2 * factor, digits=1),
            ),
            Row(
                what=f"{large:,} entries, {case}: peak memory growth",
                ours=f"{peak / 2**20:.0f} MiB",
                reference=f"the file: {size / 2**20:.0f} MiB",
                **at_most(peak / size, 4, digits=1),
            ),
        ]
    return Report(rows, samples)
