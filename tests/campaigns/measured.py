"""What a process has in memory, and what it has open, over hours."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Final, NamedTuple

from support import open_descriptors

# Seconds. Memory grows in the first ten minutes, because histories fill. Its slope is judged over
# half an hour and more.
WARM_UP: Final = 600.0
ENOUGH: Final = 1_800.0

# Of memory, in KiB a minute.
MOST_SLOPE: Final = 2.0


class Memory(NamedTuple):
    """Memory in KiB; anonymous is what no file stands behind."""

    resident: float
    anonymous: float


class Measured:
    """A process, and what was found at every sample."""

    def __init__(self, pid: int) -> None:
        self.pid, self.began = pid, time.monotonic()
        self.samples: list[tuple[float, Memory]] = []
        self.most = Counter[str]()

    def open_things(self) -> tuple[int, int]:
        """Return how many descriptors and threads it has."""
        return len(open_descriptors(self.pid)), len(os.listdir(f"/proc/{self.pid}/task"))

    def sample(self) -> None:
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {
            name: float(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)
        }
        memory = Memory(sizes["Rss"], sizes["Anonymous"])
        self.samples.append((time.monotonic() - self.began, memory))
        descriptors, threads = self.open_things()
        self.most |= Counter({"descriptors at most": descriptors, "threads at most": threads})

    def slopes(self) -> Memory | None:
        """Return by how much memory has grown a minute since the warm-up, by least squares."""
        late = [(at / 60, memory) for at, memory in self.samples if at >= WARM_UP]
        if len(late) < 3:
            return None
        minutes = [at for at, _ in late]
        columns = zip(*(memory for _, memory in late), strict=True)
        return Memory(*(statistics.linear_regression(minutes, each).slope for each in columns))

    def judge(self) -> Counter[str]:
        """Judge how memory has grown; return the figures."""
        found, (at, last) = self.slopes(), self.samples[-1]
        figures = {
            "KiB of anonymous memory at first": self.samples[0][1].anonymous,
            "KiB of anonymous memory in the end": last.anonymous,
            "KiB of resident memory in the end": last.resident,
        }
        if found and at >= WARM_UP + ENOUGH:
            assert max(found) < MOST_SLOPE, (found, self.samples)
            figures["bytes of anonymous memory a minute"] = found.anonymous * 1024
            figures["bytes of resident memory a minute"] = found.resident * 1024
        return self.most + Counter({what: round(figure) for what, figure in figures.items()})
