"""What the service manager is told: ready, alive, stuck, stopping (sd_notify(3)), in one class.

Datagrams to `$NOTIFY_SOCKET`, without a library. Nothing is sent where there is none. STATUS= has a
datagram of its own and is short: what cannot be sent of it may not hold up a sign of life.

The watchdog is fed by syncs that end, and during a long one by its progress, never by a timer: a
bridge whose event loop hangs, or whose syncs stop, is restarted by systemd after WatchdogSec=. A
first sync that takes long puts off TimeoutStartSec=.

While a filesystem does not answer (`WatchState.stuck_since`), the timeouts are put off, and STATUS=
says why. A new process would hang in its first sync as well, and where the kernel cannot end the
old one (a frozen or dying disk), each restart leaves another behind (measured).
"""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Final

from mbcap_watch.errors import printable
from mbcap_watch.limits import STUCK_SECONDS
from mbcap_watch.telemetry.outputs import OutputState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mbcap_watch.results import PersistResult, WatchState
    from mbcap_watch.settings import Settings

logger = logging.getLogger("mbcap_watch")

# While the filesystem does not answer; when that is over, a restart is worth a try.
_PUT_OFF_SECONDS: Final = 7 * 24 * 3600

# By how much each sign of progress puts off the end of a start. The next one comes, or the bridge
# calls itself stuck, within twice `STUCK_SECONDS`.
_START_SECONDS: Final = 60

# Characters of the last result in STATUS=: `systemctl status` shows one line.
_OUTCOME_LENGTH: Final = 200


class Notifier:
    """Hooks for `run` that keep the service manager informed. Never blocks, never raises."""

    def __init__(self, environ: Mapping[str, str], settings: Settings) -> None:
        # A path, or `@` and a name in the abstract namespace, for which the kernel wants a NUL.
        given = environ.get("NOTIFY_SOCKET", "")
        self._address = b"\0" + os.fsencode(given[1:]) if given[:1] == "@" else os.fsencode(given)
        self._given = _watchdog_seconds(environ) if given else 0.0
        # Fed at half of it at most; within the other half a sync must end. That takes the wait
        # for the next sweep, and two calls (the watch, the files) that are not stuck yet.
        least = 2 * (settings.sweep_interval + 2 * STUCK_SECONDS)
        self._patience = max(self._given, least) if self._given else 0.0
        self._ready = self._stuck = False
        self._fed = time.monotonic()
        self._progress: tuple[float | None, ...] = (None, None)
        self._outcome = self._status = ""
        self._unsent: dict[str, object] = {}
        cannot = f"NOTIFY_SOCKET={printable(given)}: the service manager cannot be told"
        self._state = OutputState(
            lambda problem: f"{cannot}: {problem}; trying on",
            "the service manager can be told again",
        )

    def on_result(self, result: PersistResult) -> None:
        """Remember what the last sync came to; the state that follows tells it."""
        error = f": {result.error}" if result.error else ""
        self._outcome = printable(f"{result.outcome}{error}", _OUTCOME_LENGTH) + "; "

    def on_state(self, state: WatchState) -> None:
        """Tell what is new: a sync is over, or gets on; a filesystem hangs."""
        news: dict[str, object] = {}
        before, self._progress = self._progress, (state.last_sync, state.last_progress)
        gets_on = self._progress != before
        if not self._ready and state.last_sync is not None:
            self._ready = True
            news["READY"] = 1
            if self._patience > self._given:
                news["WATCHDOG_USEC"] = _microseconds(self._patience)
        elif gets_on and not self._ready:
            news["EXTEND_TIMEOUT_USEC"] = _microseconds(_START_SECONDS)
        elif gets_on and self._patience and time.monotonic() - self._fed >= self._patience / 2:
            self._fed = time.monotonic()
            news["WATCHDOG"] = 1
        is_stuck = state.stuck_since is not None
        if is_stuck != self._stuck:
            self._stuck = is_stuck
            if is_stuck and not self._ready:  # until then it is TimeoutStartSec= that counts
                news["EXTEND_TIMEOUT_USEC"] = _microseconds(_PUT_OFF_SECONDS)
            elif self._ready and self._patience:  # to set its time starts it anew (sd_notify(3))
                seconds = _PUT_OFF_SECONDS if is_stuck else self._patience
                news["WATCHDOG_USEC"] = _microseconds(seconds)
        status = self._outcome + (f"watching by {state.mode}" if self._ready else "starting")
        if state.stuck_since is not None:
            since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(state.stuck_since))
            status = f"stuck: the filesystem has not answered a call (noticed at {since}); waiting"
        if status != self._status:
            self._status = news["STATUS"] = status
        self._send(news)

    def stopping(self) -> None:
        """Tell that the end has begun. Safe in a Python signal handler."""
        self._send({"STOPPING": 1, "STATUS": "stopping"})

    def _send(self, news: dict[str, object]) -> None:
        """Send all that is unsent. What cannot be sent now is kept, the latest of each name."""
        if not self._address:
            return
        todo, self._unsent, problem = self._unsent | news, {}, None
        status = {"STATUS": todo.pop("STATUS")} if "STATUS" in todo else {}
        for datagram in filter(None, (todo, status)):
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                    out.settimeout(0)  # a manager that does not read may not hold up the bridge
                    lines = "\n".join(f"{name}={value}" for name, value in datagram.items())
                    out.sendto(lines.encode(), self._address)
            except OSError as exc:
                self._unsent |= datagram
                problem = problem or exc
        if problem or todo or status:
            self._state.update(problem)


def _watchdog_seconds(environ: Mapping[str, str]) -> float:
    """Return how long the watchdog waits; 0.0 if there is none, or not for this process.

    `WATCHDOG_USEC` in microseconds; `WATCHDOG_PID`, if set, says whom it is meant for
    (sd_watchdog_enabled(3)).
    """
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    given = environ.get("WATCHDOG_USEC", "0")
    if given.isascii() and given.isdigit():
        return int(given) / 1_000_000
    logger.warning("WATCHDOG_USEC=%s: not a number; the watchdog is not fed", printable(given))
    return 0.0


def _microseconds(seconds: float) -> int:
    return int(seconds * 1_000_000)
