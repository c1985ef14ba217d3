"""What waiting costs: processor time and memory over 60 s in which nothing happens.

`mbcap-watch run` and watchfiles, both by inotify and by polling once a second; all four at the same
time, each beside a snapshot of 2,400 entries. Processor time is the kernel's, in ns
(`/proc/PID/task/*/schedstat`); `/proc/PID/stat` counts only whole hundredths of a second.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Final

from benchmarks.lab import Site
from benchmarks.processes import ours, running
from benchmarks.report import Report, Row, at_most

_GOALS: Final = {"inotify": 0.015, "poll": 0.1}
_SETTLE_SECONDS: Final = 3.0


def run(root: Path, *, quick: bool) -> Report:
    """Measure all four at once."""
    seconds = 5.0 if quick else 60.0
    sites = {
        f"{name} {mode}": Site(root, f"{name}-{mode}", 2_400, 24)
        for name in ("ours", "watchfiles")
        for mode in _GOALS
    }
    with contextlib.ExitStack() as stack:
        processes = {}
        for key, site in sites.items():
            site.publish(0)
            name, mode = key.split()
            command = (
                ours(site, "--mode", mode)
                if name == "ours"
                else [
                    *(sys.executable, "-m", "benchmarks.contestants.watchfiles_loop"),
                    *(site.database, mode),
                ]
            )
            processes[key] = stack.enter_context(running(command)).pid
        time.sleep(_SETTLE_SECONDS)
        before = {key: _processor_seconds(pid) for key, pid in processes.items()}
        time.sleep(seconds)
        spent = {key: _processor_seconds(pid) - before[key] for key, pid in processes.items()}
        memory = {key: _resident_mebibytes(pid) for key, pid in processes.items()}
    rows = []
    for mode, limit in _GOALS.items():
        mine, theirs = f"ours {mode}", f"watchfiles {mode}"
        row = at_most(spent[mine], limit * seconds / 60, digits=4, unit=" s")
        row["goal"] += ", less than theirs"
        row["met"] = row["met"] and spent[mine] < spent[theirs]
        rows.append(
            Row(
                what=f"idle for {seconds:.0f} s, {mode}: processor time",
                ours=f"{spent[mine]:.4f} s",
                reference=f"watchfiles: {spent[theirs]:.4f} s",
                **row,
            )
        )
        rows.append(
            Row(
                what=f"idle, {mode}: resident memory",
                ours=f"{memory[mine]:.1f} MiB",
                reference=f"watchfiles: {memory[theirs]:.1f} MiB",
                **at_most(memory[mine] * 2**20 / 1e6, 40, digits=1, unit=" MB"),
            )
        )
    return Report(rows, {"processor": spent, "memory": memory})


def _processor_seconds(pid: int) -> float:
    """All threads, those that have ended apart: in an idle process none ends."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(file.read_text(encoding="ascii").split()[0]) for file in files) / 1e9


def _resident_mebibytes(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise LookupError(pid)
