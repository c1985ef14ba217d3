"""When to sync next, and why. Pure: it is told the time and never waits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbcap_watch.results import Reason
    from mbcap_watch.settings import Settings


class Scheduler:
    """Merges all reasons to sync into one stream of syncs. Times are monotonic seconds.

    - `rename`: the first notice is served at once. Notices during a sync, or within `debounce` of
      it, merge into one more sync, which waits for `debounce` seconds of quiet but never longer
      than `max_wait`.
    - `poll` or `sweep`: at a steady pace that a slow sync does not shift.
    - `resync`: `resync` seconds after the last full comparison with the database.
    - `retry`: once, when asked for.
    - `request`: at once, but not within `debounce` of a sync; requests until then merge.
    """

    def __init__(self, settings: Settings, now: float) -> None:
        self._settings = settings
        self._first_notice = self._last_notice = math.inf
        self._quiet_until = -math.inf
        self._paces: dict[Reason, float] = {
            "sweep": settings.sweep_interval,
            "poll": settings.poll_interval,
        }
        self._due: dict[Reason, float] = {
            "request": math.inf,
            "resync": now + settings.resync,
            "sweep": now + settings.sweep_interval,
            "poll": now,
        }

    def request(self, now: float) -> None:
        """Note that somebody wants a sync."""
        self._due["request"] = min(self._due["request"], now)

    def notify(self, now: float) -> None:
        """Note that the file was replaced."""
        self._first_notice = min(self._first_notice, now)
        self._last_notice = now

    @property
    def pending(self) -> bool:
        """Whether a notice waits to be served."""
        return self._first_notice < math.inf

    def next(self, *, polling: bool) -> tuple[float, Reason]:
        """Return when the next sync is due, which may be in the past, and why."""
        dues = {"rename": self._rename_due(), **self._due}
        dues["request"] = max(dues["request"], self._quiet_until)
        if not polling:
            del dues["poll"]
        reason = min(dues, key=dues.__getitem__)
        return dues[reason], reason

    def begin(self, reason: Reason, now: float) -> None:
        """Note that a sync starts. What is notified from now on wants another one."""
        self._first_notice = math.inf
        if pace := self._paces.get(reason):
            self._due[reason] += pace * max(1, math.ceil((now - self._due[reason]) / pace))
        elif reason in ("retry", "request"):
            self._due[reason] = math.inf

    def end(self, now: float, *, idle: bool, compared: bool, retry_in: float | None) -> None:
        """Note that a sync has ended.

        Args:
            now: the time.
            idle: whether there was nothing to do. Such a sync is no part of a burst: a rename
                just after it is served at once.
            compared: whether the database was compared as a whole; `resync` counts from there.
            retry_in: seconds until the next retry. None keeps a retry that is planned, unless the
                database was compared: then it is no longer needed.

        """
        if not idle:
            self._quiet_until = now + self._settings.debounce
        if compared or self._due["resync"] <= now:
            self._due["resync"] = now + self._settings.resync
        if retry_in is not None or compared:
            self._due["retry"] = math.inf if retry_in is None else now + retry_in

    def _rename_due(self) -> float:
        if self._first_notice >= self._quiet_until:
            return self._first_notice
        longest = max(self._settings.max_wait, self._settings.debounce)
        return min(self._last_notice + self._settings.debounce, self._first_notice + longest)
