"""`Series`: how the latest values spread, in bounded memory. Pure."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from mbcap_watch.telemetry.stats import WINDOW, Spread

if TYPE_CHECKING:
    from collections.abc import Iterable


class Series:
    """Values in seconds: how many, how much, and the latest."""

    def __init__(self) -> None:
        self._count, self._total = 0, 0.0
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self._spread: Spread | None = Spread()

    def extend(self, values: Iterable[float]) -> None:
        """Add `values`, in seconds."""
        for value in values:
            self._count += 1
            self._total += value
            self._latest.append(value)
            self._spread = None

    def spread(self) -> Spread:
        """Return it; values are sorted only after there was a new one."""
        if self._spread is None:
            self._spread = self._sorted()
        return self._spread

    def _sorted(self) -> Spread:
        ordered = sorted(self._latest)

        def percentile(part: float) -> float:
            return milliseconds(ordered[math.ceil(part * len(ordered)) - 1])

        return Spread(
            count=self._count,
            total=milliseconds(self._total),
            p50=percentile(0.50),
            p95=percentile(0.95),
            p99=percentile(0.99),
            max=milliseconds(ordered[-1]),
        )


def milliseconds(seconds: float) -> float:
    """Return `seconds` in milliseconds, to the microsecond."""
    return round(seconds * 1000, 3)
