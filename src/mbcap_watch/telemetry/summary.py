"""`Values`: a summary of many durations, in bounded memory. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING

from mbcap_watch.telemetry.stats import BUCKETS, WINDOW, Summary

if TYPE_CHECKING:
    from collections.abc import Iterable


class Values:
    """Durations in seconds: how many, how much, and the latest."""

    def __init__(self) -> None:
        self._total = 0.0
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self._buckets = [0] * (len(BUCKETS) + 1)

    def extend(self, values: Iterable[float]) -> None:
        """Add `values`, in seconds."""
        for value in values:
            self._total += value
            self._latest.append(value)
            self._buckets[bisect_left(BUCKETS, value)] += 1

    def summary(self) -> Summary:
        """Return the summary of all values so far."""
        if not self._latest:
            return Summary()
        ordered = sorted(self._latest)

        def percentile(part: float) -> float:
            return milliseconds(ordered[math.ceil(part * len(ordered)) - 1])

        return Summary(
            count=sum(self._buckets),
            total=milliseconds(self._total),
            p50=percentile(0.50),
            p95=percentile(0.95),
            p99=percentile(0.99),
            max=milliseconds(ordered[-1]),
            buckets=tuple(self._buckets),
        )


def milliseconds(seconds: float) -> float:
    """Return `seconds` in milliseconds, to the microsecond."""
    return round(seconds * 1000, 3)
