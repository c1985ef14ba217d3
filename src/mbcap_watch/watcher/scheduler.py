"""When to look next, and why. Pure: it is told the time and never waits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mbcap_watch.results import Reason
    from mbcap_watch.settings import Settings


class Appointment(NamedTuple):
    """The next look."""

    at: float
    reason: Reason


class Agenda:
    """Merges all reasons to look into one stream of looks. Times are monotonic seconds.

    - `rename`: the first ring is served at once. Rings during a look, or within `debounce` of it,
      merge into one more look, which waits for `debounce` seconds of quiet but never longer than
      `max_wait`.
    - `poll` or `sweep`: at a steady pace that a slow look does not shift.
    - `resync`: so long after the last full comparison with the database.
    - `retry`: once, when asked for.
    - `request`: at once, but not within `debounce` of a look; requests until then merge.
    """

    def __init__(self, settings: Settings, now: float) -> None:
        self._settings = settings
        self._first_ring = math.inf
        self._last_ring = -math.inf
        self._quiet_until = -math.inf
        self._ticks: dict[Reason, float] = {"poll": now, "sweep": now + settings.sweep_interval}
        self._resync = now + settings.resync
        self._retry = math.inf
        self._request = math.inf

    def request(self, now: float) -> None:
        """Note that somebody wants a look."""
        self._request = min(self._request, now)

    def ring(self, now: float) -> None:
        """Note that the file was replaced."""
        self._first_ring = min(self._first_ring, now)
        self._last_ring = now

    @property
    def ringing(self) -> bool:
        """Whether a ring waits to be served."""
        return self._first_ring < math.inf

    def next(self, *, polling: bool) -> Appointment:
        """Return the next look; it may be due already."""
        appointments = [
            Appointment(self._ring_due(), "rename"),
            Appointment(max(self._request, self._quiet_until), "request"),
            Appointment(self._retry, "retry"),
            Appointment(self._resync, "resync"),
            Appointment(self._ticks["sweep"], "sweep"),
        ]
        if polling:
            appointments.append(Appointment(self._ticks["poll"], "poll"))
        return min(appointments, key=lambda appointment: appointment.at)

    def begin(self, reason: Reason, now: float) -> None:
        """Note that a look starts. What rings from now on wants another one."""
        self._first_ring, self._last_ring = math.inf, -math.inf
        if reason == "retry":
            self._retry = math.inf
        if reason == "request":
            self._request = math.inf
        if reason in ("poll", "sweep"):
            interval, late = self._interval(reason), now - self._ticks[reason]
            self._ticks[reason] += interval * max(1, math.ceil(late / interval))

    def end(self, now: float, *, idle: bool, compared: bool, retry_in: float | None) -> None:
        """Note that a look has ended.

        Args:
            now: the time.
            idle: whether there was nothing to do. Such a look is no part of a burst: a rename
                just after it is served at once.
            compared: whether the database was compared as a whole; `resync` counts from there.
            retry_in: seconds after which to look again by itself; None leaves a retry that is
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

    def _ring_due(self) -> float:
        if self._first_ring >= self._quiet_until:
            return self._first_ring
        return min(
            self._last_ring + self._settings.debounce,
            self._first_ring + max(self._settings.max_wait, self._settings.debounce),
        )

    def _interval(self, reason: Reason) -> float:
        if reason == "poll":
            return self._settings.poll_interval
        return self._settings.sweep_interval
