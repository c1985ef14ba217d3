"""What the service manager is told: ready, alive, stuck, stopping (sd_notify(3)), in one class.

Datagrams to `$NOTIFY_SOCKET`, without a library. Nothing is sent where there is none. STATUS= has a
datagram of its own and is short: what cannot be sent of it may not hold up a sign of life.

The watchdog is fed by syncs that came to their end, and during a long one by each few thousand rows
read or written, never by a timer: a bridge whose event loop hangs, or whose syncs stop, is
restarted by systemd after WatchdogSec=. A first sync that takes long puts off TimeoutStartSec=.

A filesystem that does not answer is another matter: the bridge itself says so
(`WatchState.stuck_since`), its event loop lives, and it goes on by itself when the mount does. A
restart helps nobody then: the new process hangs in its first sync as well, again and again, and
where the kernel cannot end the old one (a frozen or dying disk) each leaves another behind
(measured). So the timeouts are put off, and STATUS= says what is the matter (`systemctl status`),
as does the log.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Final

from mbcap_watch.errors import printable
from mbcap_watch.limits import STUCK_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mbcap_watch.results import PersistResult, WatchState
    from mbcap_watch.settings import Settings

logger = logging.getLogger("mbcap_watch")

# For how long the manager's timeouts are put off while the filesystem does not answer; when that
# is over, a restart is worth a try.
_PUT_OFF_SECONDS: Final = 7 * 24 * 3600

# By how much each sign of progress puts off the end of a start. The next one comes, or the bridge
# calls itself stuck, within twice `STUCK_SECONDS`.
_START_SECONDS: Final = 60

# Characters of the last result in STATUS=: `systemctl status` shows one line.
_OUTCOME_LENGTH: Final = 200


class Notifier:
    """Hooks for `run` that keep the service manager informed. Never blocks, never raises.

    Args:
        environ: where `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` are looked up.
        settings: `sweep_interval` is how far apart syncs may be.

    """

    def __init__(self, environ: Mapping[str, str], settings: Settings) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._given = _watchdog_seconds(environ) if self._address else 0.0
        # Fed at half of it at most; within the other half a sync must end. That takes the wait
        # for the next sweep, and two calls (the watch, the files) that are not stuck yet.
        least = 2 * (settings.sweep_interval + 2 * STUCK_SECONDS)
        self._patience = max(self._given, least) if self._given else 0.0
        self._ready = False
        self._stuck = False
        self._fed = time.monotonic()
        self._progress: tuple[float | None, ...] = (None, None)
        self._outcome = ""
        self._status = ""
        self._unsent: list[str] = []
        self._problem: str | None = None

    def on_result(self, result: PersistResult) -> None:
        """Remember what the last sync came to; the state that follows tells it."""
        error = f": {result.error}" if result.error else ""
        self._outcome = printable(f"{result.outcome}{error}", _OUTCOME_LENGTH) + "; "

    def on_state(self, state: WatchState) -> None:
        """Tell what is new: a sync is over, or gets on; a filesystem hangs."""
        if not self._address:
            return
        messages = []
        if not self._ready and state.last_sync is not None:
            self._ready = True
            messages.append("READY=1")
            if self._patience > self._given:
                messages.append(_watchdog(self._patience))
        stuck = state.stuck_since is not None
        if stuck != self._stuck:
            self._stuck = stuck
            messages += self._put_off() if stuck else self._resume()
        messages += self._feed(state)
        status = self._describe(state)
        if status != self._status:
            self._status = status
            messages.append(f"STATUS={status}")
        self._send(messages)

    def stopping(self) -> None:
        """Tell that the end has begun. Safe in a Python signal handler."""
        if self._address:
            self._send(["STOPPING=1", "STATUS=stopping"])

    def _put_off(self) -> list[str]:
        if not self._ready:  # until then it is TimeoutStartSec= that counts
            return [_extend(_PUT_OFF_SECONDS)]
        return [_watchdog(_PUT_OFF_SECONDS)] if self._patience else []

    def _resume(self) -> list[str]:
        return [_watchdog(self._patience)] if self._patience and self._ready else []

    def _feed(self, state: WatchState) -> list[str]:
        """Return what a sync that has ended, or gets on, is worth.

        The watchdog is fed only if it has not been for half its time, and not before READY=1,
        which would set it off early.
        """
        before, self._progress = self._progress, (state.last_sync, state.last_progress)
        if self._progress == before:
            return []
        if not self._ready:
            return [_extend(_START_SECONDS)]
        now = time.monotonic()
        if not self._patience or now - self._fed < self._patience / 2:
            return []
        self._fed = now
        return ["WATCHDOG=1"]

    def _describe(self, state: WatchState) -> str:
        if state.stuck_since is not None:
            since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(state.stuck_since))
            return f"stuck: the filesystem has not answered a call (noticed at {since}); waiting"
        how = f"watching by {state.mode}" if self._ready else "starting"
        return self._outcome + how

    def _send(self, messages: list[str]) -> None:
        """Send all that is unsent; what cannot be sent now goes with the next."""
        # Of what stands for a moment, the latest counts; READY=1 must arrive one day.
        names = {_name(message) for message in messages}
        waiting = [message for message in self._unsent if _name(message) not in names]
        todo, self._unsent, problem = waiting + messages, [], None
        for is_status in (False, True):
            datagram = [message for message in todo if (_name(message) == "STATUS") == is_status]
            if datagram and (refusal := self._transmit(datagram)):
                self._unsent += datagram
                problem = problem or refusal
        if problem is not None and problem != self._problem:
            logger.warning("the service manager cannot be told: %s; trying on", problem)
        self._problem = problem

    def _transmit(self, messages: list[str]) -> str | None:
        """Send one datagram; return what kept it from being sent."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                # Not for a moment may a manager that does not read hold up the bridge.
                sender.settimeout(0)
                sender.sendto("\n".join(messages).encode(), self._address)
        except OSError as exc:
            return exc.strerror or str(exc)
        return None


def _address(given: str) -> str | bytes:
    """Return the socket's address; empty if there is none that can be used.

    An absolute path, or `@` and a name in the abstract namespace, which the kernel wants with a
    NUL in front (sd_notify(3), unix(7)).
    """
    if given.startswith("@") and len(given) > 1:
        return b"\0" + os.fsencode(given[1:])
    if given and not given.startswith("/"):
        logger.warning("NOTIFY_SOCKET=%s: not a path, and not @name; not used", printable(given))
        return ""
    return given


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


def _watchdog(seconds: float) -> str:
    """Return what changes the watchdog's time, and starts it anew (sd_notify(3))."""
    return f"WATCHDOG_USEC={int(seconds * 1_000_000)}"


def _extend(seconds: int) -> str:
    """Return what puts off the end of a start that takes long (sd_notify(3))."""
    return f"EXTEND_TIMEOUT_USEC={seconds * 1_000_000}"


def _name(message: str) -> str:
    return message.partition("=")[0]
