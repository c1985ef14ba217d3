"""When to sync next, and why. Pure: it is told the time and never waits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mbcap_watch.results import Reason
    from mbcap_watch.settings import Settings


class Due(NamedTuple):
    """The next sync."""

    at: float
    reason: Reason


class Scheduler:
    """Merges all reasons to sync into one stream of syncs. Times are monotonic seconds.

    - `rename`: the first notice is served at once. Notices during a sync, or within `debounce` of
      it, merge into one more sync, which waits for `debounce` seconds of quiet but never longer
      than `max_wait`.
    - `poll` or `sweep`: at a steady pace that a slow sync does not shift.
    - `resync`: so long after the last full comparison with the database.
    - `retry`: once, when asked for.
    - `request`: at once, but not within `debounce` of a sync; requests until then merge.
    """

    def __init__(self, settings: Settings, now: float) -> None:
        self._settings = settings
        self._first_notice = math.inf
        self._last_notice = -math.inf
        self._quiet_until = -math.inf
        self._paces: dict[Reason, float] = {
            "poll": settings.poll_interval,
            "sweep": settings.sweep_interval,
        }
        self._ticks: dict[Reason, float] = {"poll": now, "sweep": now + settings.sweep_interval}
        self._resync = now + settings.resync
        self._retry = math.inf
        self._request = math.inf

    def request(self, now: float) -> None:
        """Note that somebody wants a sync."""
        self._request = min(self._request, now)

    def notify(self, now: float) -> None:
        """Note that the file was replaced."""
        self._first_notice = min(self._first_notice, now)
        self._last_notice = now

    @property
    def pending(self) -> bool:
        """Whether a notice waits to be served."""
        return self._first_notice < math.inf

    def next(self, *, polling: bool) -> Due:
        """Return the next sync; it may be due already."""
        dues: dict[Reason, float] = {
            "rename": self._rename_due(),
            "request": max(self._request, self._quiet_until),
            "retry": self._retry,
            "resync": self._resync,
            "sweep": self._ticks["sweep"],
            "poll": self._ticks["poll"] if polling else math.inf,
        }
        reason = min(dues, key=dues.__getitem__)
        return Due(dues[reason], reason)

    def begin(self, reason: Reason, now: float) -> None:
        """Note that a sync starts. What is notified from now on wants another one."""
        self._first_notice, self._last_notice = math.inf, -math.inf
        if reason == "retry":
            self._retry = math.inf
        if reason == "request":
            self._request = math.inf
        if pace := self._paces.get(reason):
            late = now - self._ticks[reason]
            self._ticks[reason] += pace * max(1, math.ceil(late / pace))

    def end(self, now: float, *, idle: bool, compared: bool, retry_in: float | None) -> None:
        """Note that a sync has ended.

        Args:
            now: the time.
            idle: whether there was nothing to do. Such a sync is no part of a burst: a rename
                just after it is served at once.
            compared: whether the database was compared as a whole; `resync` counts from there.
            retry_in: seconds after which to sync again by itself; None leaves a retry that is
                put down alone, unless the comparison has made it needless.

        """
        if not idle:
            self._quiet_until = now + self._settings.debounce
        if compared or self._resync <= now:
            self._resync = now + self._settings.resync
        if retry_in is not None:
            self._retry = now + retry_in
        elif compared:
            self._retry = math.inf

    def _rename_due(self) -> float:
        if self._first_notice >= self._quiet_until:
            return self._first_notice
        return min(
            self._last_notice + self._settings.debounce,
            self._first_notice + max(self._settings.max_wait, self._settings.debounce),
        )
