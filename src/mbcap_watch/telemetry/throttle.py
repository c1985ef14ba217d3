"""Which changes of a state are worth a line of log: no flood, and nothing forgotten. Pure."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Hashable

# Of one kind of line, so many are logged in so many seconds. What flaps for a day then takes some
# 1,400 lines of a kind, not the 86,400 of a change a second.
MOST: Final = 5
WINDOW: Final = 300.0

# Trouble that lasts is said again: whoever reads the log of today is to see it.
REMINDER: Final = 3600.0


@dataclasses.dataclass
class _Window:
    since: float
    passed: int = 0
    suppressed: int = 0


class Throttle:
    """Follows one state, and decides when it is said. All times are seconds of any one clock.

    What counts is the difference between the state and what was logged last. So a change that was
    suppressed is logged once that is allowed again, unless the state has changed back by then.

    Args:
        calm: the state that need not be said as long as nothing else was.
        remind_after: seconds after which a state other than `calm` is said again.

    """

    def __init__(self, calm: Hashable, *, remind_after: float = math.inf) -> None:
        self._calm = self._seen = self._said = calm
        self._remind_after = remind_after
        self._said_at = 0.0
        self._windows: dict[str, _Window] = {}

    def is_news(self, state: Hashable, kind: str, now: float) -> bool:
        """Return whether to say `state` now, with a line of this kind; counts it if not."""
        changed, self._seen = state != self._seen, state
        lasting = state != self._calm and now - self._said_at >= self._remind_after
        if state == self._said and not lasting:
            return False
        window = self._windows.setdefault(kind, _Window(now))
        if window.passed == MOST:
            window.suppressed += changed
            return False
        window.passed += 1
        self._said, self._said_at = state, now
        return True

    def suppressed(self, now: float) -> dict[str, int]:
        """Return how many changes were suppressed in the windows that are over, by kind.

        To be asked before `is_news`, which goes on with the windows that are not over.
        """
        over = [kind for kind, window in self._windows.items() if now - window.since >= WINDOW]
        counts = {kind: self._windows.pop(kind).suppressed for kind in over}
        return {kind: count for kind, count in counts.items() if count}
