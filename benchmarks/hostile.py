"""Files of max_bytes that take as much memory as can be, one after the other, twice, in one daemon.

The daemon runs with the environment of the shipped unit, and its peak memory (VmHWM) is held
against MemoryMax= there. The cost of each file by itself is the growth of a fresh process
(`once.py`) that reads it for a database that is not there: from the file to what is wanted.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import documents
from benchmarks.lab import Site
from benchmarks.processes import ROOT, Helper, ours, running
from benchmarks.report import Report, Row, at_most
from mbcap_watch.settings import DEFAULT_MAX_BYTES
from mbcap_watch.snapshot import SNAPSHOT_NAME, ensure_snapshot_dir

if TYPE_CHECKING:
    from benchmarks.processes import Running

_UNIT: Final = ROOT / "config" / "mbcap-watch.service"
_GIVE_UP_SECONDS: Final = 120.0


def run(root: Path, *, quick: bool) -> Report:
    """Measure all documents; a quick run takes each once in the daemon."""
    size = DEFAULT_MAX_BYTES
    files = {}
    for number, (name, make) in enumerate(documents.ALL.items()):
        files[name] = root / f"{number}.json"
        files[name].write_bytes(make(size))
    alone = {name: _growth(root / "alone", file) / size for name, file in files.items()}
    costliest = max(alone, key=lambda name: alone[name])
    site = Site(root, "site", 2_400, 24)
    site.publish(0)
    unit = _UNIT.read_text(encoding="utf-8")
    environment = re.findall(r"^Environment=(.+)$", unit, re.MULTILINE)
    peaks = []
    with running(["env", *environment, *ours(site)]) as daemon:
        for _ in range(1 if quick else 2):
            for file in files.values():
                _publish(file, site.target, daemon)
                peaks.append(_peak(daemon.pid))
    [most] = re.findall(r"^MemoryMax=(\d+)M$", unit, re.MULTILINE)
    limit = int(most) << 20
    rows = [
        Row(
            what=f"{len(files)} hostile files of max_bytes ({size >> 20} MiB): the costliest,"
            f" from file to targets ({costliest})",
            ours=f"{alone[costliest] * size / 2**20:.0f} MiB",
            reference=f"the file: {size >> 20} MiB",
            **at_most(alone[costliest], 10, digits=1),
        ),
        Row(
            what="all of them in one `mbcap-watch run`: peak memory",
            ours=f"{peaks[-1] / 2**20:.0f} MiB",
            reference=f"MemoryMax: {most} MiB",
            **at_most(peaks[-1] / limit, 1),
        ),
    ]
    return Report(rows, {"alone": alone, "peaks": peaks})


def _growth(directory: Path, file: Path) -> int:
    """Return by how much the memory of a fresh process grows when it reads the file."""
    database = directory / "meshcore.db"
    target = ensure_snapshot_dir(database) / SNAPSHOT_NAME
    target.unlink(missing_ok=True)
    target.hardlink_to(file)
    with Helper("once", database) as process:
        return int(process.receive()["growth"])


def _publish(file: Path, target: Path, daemon: Running) -> None:
    """Put a copy in place, and wait for the daemon's answer."""
    answers = len(daemon.lines)
    staged = target.with_suffix(".staged")
    staged.write_bytes(file.read_bytes())
    staged.replace(target)
    deadline = time.monotonic() + _GIVE_UP_SECONDS
    while len(daemon.lines) == answers:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer to {file}")
        time.sleep(0.01)


def _peak(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise LookupError(pid)
