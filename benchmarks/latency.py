"""From the rename in another process until a third connection sees every value.

2,400 entries, 24 of them changed. Each contestant serves a database and a directory of its own and
runs all the time; rounds visit one after the other, so that noise falls on all alike:

- ours: `mbcap-watch run` with its defaults;
- bare: raw inotify, one thread, one connection kept open (`contestants/bare.py`): the floor;
- watchfiles: `awatch` with its defaults, then a straightforward apply;
- shell: `inotifywait -m | while read` that starts a Python script with the same apply.

The slow two take part in every fifth round.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
import time
from typing import TYPE_CHECKING, Final

from benchmarks import plot
from benchmarks.lab import Site, Witness
from benchmarks.processes import ROOT, Helper, ours, running
from benchmarks.report import Report, Row, at_most, percentile, spread

if TYPE_CHECKING:
    from pathlib import Path

NODES: Final = 2_400
MOVING: Final = 24
# Longer than our debounce, so that each rename is an event of its own.
PAUSE: Final = 0.15
_LOOP = 'inotifywait -m -q -e moved_to --format %f "$3" | while read -r _; do "$1" "$2" "$4"; done'


def commands(root: Path) -> dict[str, tuple[Site, list[object], bool]]:
    """Return each contestant's site, its command, and whether it says when it is ready."""
    sites = {
        name: Site(root, name, NODES, MOVING) for name in ("ours", "bare", "watchfiles", "shell")
    }
    module = [sys.executable, "-m"]
    script = ROOT / "benchmarks" / "contestants" / "straightforward.py"
    shell = sites["shell"]
    found: dict[str, tuple[Site, list[object], bool]] = {
        "ours": (sites["ours"], ours(sites["ours"]), True),
        "bare": (
            sites["bare"],
            [*module, "benchmarks.contestants.bare", sites["bare"].database],
            True,
        ),
        "watchfiles": (
            sites["watchfiles"],
            [*module, "benchmarks.contestants.watchfiles_loop", sites["watchfiles"].database],
            True,
        ),
    }
    if shutil.which("inotifywait"):
        arguments = [sys.executable, script, shell.target.parent, shell.database]
        found["shell"] = (shell, ["sh", "-c", _LOOP, "sh", *arguments], False)
    else:
        sys.stderr.write("latency: no inotifywait (inotify-tools), so no shell loop\n")
    return found


def run(root: Path, *, quick: bool) -> Report:
    """Measure 300 samples of ours and of the bare loop, 60 of the others."""
    rounds = 30 if quick else 300
    contestants = commands(root)
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    with contextlib.ExitStack() as stack:
        for _, command, ready in contestants.values():
            stack.enter_context(running(command, ready=ready))
        publisher = stack.enter_context(Helper("publisher"))
        witnesses = {name: Witness(site) for name, (site, _, _) in contestants.items()}
        time.sleep(1.0)
        for number in range(-2, rounds):
            for name, (site, _, _) in contestants.items():
                if name in ("watchfiles", "shell") and number % 5 and number >= 0:
                    continue
                version = len(samples[name]) % 2 if number >= 0 else number % 2
                seconds = _sample(publisher, site, witnesses[name], version)
                if number >= 0:
                    samples[name].append(seconds)
                time.sleep(PAUSE)
    if not quick:
        plot.write(ROOT / "benchmarks" / "latency.svg", samples)
    return Report(_rows(samples), dict(samples))


def _sample(publisher: Helper, site: Site, witness: Witness, version: int) -> float:
    staged = site.stage(version)
    publisher.send({"staged": str(staged), "target": str(site.target)})
    seen = witness.wait(version)
    renamed: int = publisher.receive()
    return (seen - renamed) / 1e9


def _rows(samples: dict[str, list[float]]) -> list[Row]:
    mine, floor = samples["ours"], samples["bare"]
    rows = [
        Row(
            what=f"rename → visible, {NODES:,} entries, {MOVING} changed, p{percent}",
            ours=f"{percentile(mine, percent) * 1000:.2f} ms",
            reference=f"bare loop: {percentile(floor, percent) * 1000:.2f} ms",
            **at_most(percentile(mine, percent) / percentile(floor, percent), limit),
        )
        for percent, limit in ((50, 1.25), (99, 3.0))
    ]
    for name in ("watchfiles", "shell"):
        if name in samples:
            times = statistics.median(samples[name]) / statistics.median(mine)
            rows.append(
                Row(
                    what="the same, median",
                    ours=spread(mine),
                    reference=f"{name}: {spread(samples[name])}",
                    outcome=f"{times:.1f}× sooner",
                    goal="≥ 10× sooner",
                    met=times >= 10,
                )
            )
    return rows
