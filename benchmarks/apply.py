"""100,000 entries with all rows, 1 % of them, or none changed: total and hold of the write lock.

Ours is `persist_once` with its defaults; beside it are per-row UPDATEs with `executemany` in one
transaction (`contestants/per_row.py`), which the goals are about, and the algorithm of CoreScope's
ingestor (`contestants/reference.py`). All in this process, in turns, each on a database of its own
that another connection keeps open; the clock runs from the call to its return, with reading,
decoding, connecting and closing. The hold is what either measures itself (for all that ends
when COMMIT has returned, an automatic checkpoint included) and, in rounds of its own that are not
timed, what `lockprobe` sees from outside.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING, Final

import anyio

from benchmarks.contestants import per_row, reference
from benchmarks.lab import Site
from benchmarks.processes import Helper
from benchmarks.report import Report, Row, at_most, spread
from mbcap_watch import Settings, persist_once

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NODES: Final = 100_000
# What changes: how many rows, and at most how much of the reference's total and of its hold.
_CASES: Final[dict[str, tuple[int, float, float | None]]] = {
    "all rows changed": (NODES, 1.05, 0.05),
    "nothing changed": (0, 0.45, None),
    "1 % changed": (NODES // 100, 0.45, 0.02),
}


def run(root: Path, *, quick: bool) -> Report:
    """Measure the three cases."""
    rows: list[Row] = []
    samples: dict[str, dict[str, list[float]]] = {}
    for number, (case, (moving, total, hold)) in enumerate(_CASES.items()):
        found = _measure(root / str(number), moving, timed=3 if quick else 15, probed=3)
        samples[case] = found
        rows += _rows(f"{NODES:,} entries, {case}", found, total, hold)
    return Report(rows, dict(samples))


def _ours(site: Site) -> tuple[float, float]:
    started = time.perf_counter()
    result = anyio.run(persist_once, Settings(site.database))
    seconds = time.perf_counter() - started
    assert result.changed_active + result.changed_inactive == len(site.moving), result
    return seconds, result.lock_seconds


def _executemany(site: Site) -> tuple[float, float]:
    return per_row.apply(site.database)


def _row_by_row(site: Site) -> tuple[float, float]:
    return reference.apply(site.database)


def _measure(root: Path, moving: int, *, timed: int, probed: int) -> dict[str, list[float]]:
    root.mkdir()
    contestants: dict[str, tuple[Site, Callable[[Site], tuple[float, float]]]] = {
        "ours": (Site(root, "ours", NODES, moving), _ours),
        "theirs": (Site(root, "theirs", NODES, moving), _executemany),
        "reference": (Site(root, "reference", NODES, moving), _row_by_row),
    }
    found: dict[str, list[float]] = {
        f"{name} {kind}": [] for name in contestants for kind in ("total", "held", "held outside")
    }
    for site, _ in contestants.values():
        site.publish(1)
        per_row.apply(site.database)
    for number in range(timed + probed):
        for name, (site, apply) in contestants.items():
            site.publish(number % 2)
            gc.collect()
            if number < timed:
                seconds, held = apply(site)
                found[f"{name} total"].append(seconds)
                found[f"{name} held"].append(held)
                continue
            with Helper("lockprobe", site.database) as probe:
                probe.ask()
                apply(site)
                found[f"{name} held outside"].append(probe.ask())
    for site, _ in contestants.values():
        site.close()
    return found


def _rows(what: str, found: dict[str, list[float]], total: float, hold: float | None) -> list[Row]:
    middle = {name: statistics.median(values) for name, values in found.items()}
    rows = [
        Row(
            what=f"{what}: total",
            ours=spread(found["ours total"]),
            reference=f"executemany: {spread(found['theirs total'])}",
            **at_most(middle["ours total"] / middle["theirs total"], total),
        ),
        _beside_the_reference(what, found, middle),
    ]
    if hold is None:
        longest = max(found["ours held"] + found["ours held outside"])
        rows.append(
            Row(
                what=f"{what}: write lock",
                ours=f"{longest * 1000:.2f} ms",
                reference=f"executemany: {spread(found['theirs held'])}",
                outcome="never taken" if longest == 0 else "taken",
                goal="no lock",
                met=longest == 0,
            )
        )
        return rows
    rows.extend(
        Row(
            what=f"{what}: longest hold, {seen}",
            ours=spread(found[f"ours {kind}"]),
            reference=f"executemany: {spread(found[f'theirs {kind}'])}",
            **at_most(middle[f"ours {kind}"] / middle[f"theirs {kind}"], hold, digits=3),
        )
        for kind, seen in (("held", "as measured inside"), ("held outside", "seen from outside"))
    )
    return rows


def _beside_the_reference(
    what: str, found: dict[str, list[float]], middle: dict[str, float]
) -> Row:
    ratio = middle["ours total"] / middle["reference total"]
    held = spread(found["reference held"])
    return Row(
        what=f"{what}: total, beside the reference's algorithm",
        ours=spread(found["ours total"]),
        reference=f"row by row: {spread(found['reference total'])}, lock held {held}",
        outcome=f"{ratio:.2f}×",
    )
