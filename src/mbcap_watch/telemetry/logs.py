"""What the command line logs: changes of state, not ticks."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mbcap_watch.errors import printable
from mbcap_watch.results import WatchState
from mbcap_watch.telemetry.throttle import REMINDER, WINDOW, Throttle
from mbcap_watch.telemetry.writer import LineWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from mbcap_watch.results import PersistResult

logger = logging.getLogger("mbcap_watch")


# For how long the end waits for whoever reads the log.
_FLUSH_SECONDS: Final = 0.5


class _TextFormatter(logging.Formatter):
    """Makes all text safe for a terminal: no message can look like a line of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002, N802
        return _stamp(record.created)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return _indented(super().formatStack(stack_info))


class _JsonFormatter(_TextFormatter):
    """One JSON object a line: the time, the level, the message, and the data behind it."""

    def format(self, record: logging.LogRecord) -> str:
        data = getattr(record, "data", None)  # ours is flat; a guest's may be anything
        fields = {
            "time": _stamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **(data if isinstance(data, dict) else {}),
        }
        fields = {printable(str(name)): _visible(value) for name, value in fields.items()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


def _visible(value: object) -> object:
    """Return `value` as JSON can hold it: no encoding has room for the bytes of some paths."""
    return value if value is None or isinstance(value, int | float) else printable(str(value))


def _indented(lines: str) -> str:
    """Return `lines` so that none can be taken for the first line of another message."""
    return "\n".join("  " + printable(line) for line in lines.split("\n"))


def _stamp(seconds: float) -> str:
    milliseconds = int(seconds % 1 * 1000)
    return time.strftime(f"%Y-%m-%dT%H:%M:%S.{milliseconds:03d}Z", time.gmtime(seconds))


class UnblockedHandler(logging.Handler):
    """Logs to standard error without waiting for whoever reads it; says how many lines were lost.

    `logging` flushes it when the process ends.
    """

    def __init__(self) -> None:
        super().__init__()
        # Python has no standard error if it was closed before the start. Its number is then that
        # of another file, the database perhaps.
        closed = sys.stderr is None
        descriptor = os.open(os.devnull, os.O_WRONLY) if closed else sys.stderr.fileno()
        self._writer = LineWriter(descriptor, self._lost)

    def emit(self, record: logging.LogRecord) -> None:
        """Have the line written."""
        try:
            self._writer.write(self.format(record))
        except Exception:  # noqa: BLE001 - as every handler of logging does
            self.handleError(record)

    def flush(self) -> None:
        """Give the reader a moment."""
        self._writer.flush(_FLUSH_SECONDS)

    def _lost(self, count: int) -> str:
        told = {
            "name": logger.name,
            "levelname": "WARNING",
            "msg": "%d lines of the log are lost: nobody read standard error",
            "args": (count,),
            "data": {"lost": count},
        }
        return self.format(logging.makeLogRecord(told))


def configure(level: str, style: str, handler: logging.Handler | None = None) -> None:
    """Log to standard error; standard output is for results.

    Args:
        level: from which on our own lines are logged; those of others are from `warning` on.
        style: `text` or `json`.
        handler: what logs instead of the one that waits for its reader.

    """
    handler = handler or logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if style == "json" else _TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(level.upper())


class ResultLog:
    """A hook for results: one line per applied snapshot, one per change of state.

    Lines on applied snapshots are the record, and are never suppressed; all others are when they
    repeat (`throttle`).

    Args:
        clock: seconds that never go back.

    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._trouble = Throttle(calm=None, remind_after=REMINDER)

    def __call__(self, result: PersistResult) -> None:
        """Log `result` if it is news."""
        now = self._clock()
        _log_suppressed(self._trouble, now)
        data = {"data": result.to_dict()}
        trouble = _trouble(result)
        news = self._trouble.is_news(trouble, trouble[0] if trouble else "recovered", now)
        if result.outcome == "applied":
            logger.info("%s", summary(result), extra=data)
        if not news:
            logger.debug("%s: %s", result.reason, result.outcome, extra=data)
        elif trouble is None:
            if result.outcome != "applied":  # that line says it already
                logger.info("recovered: the database is as the snapshot says", extra=data)
        elif result.outcome == "no_snapshot":
            nothing = "; there is no database either" if result.cause == "no_database" else ""
            logger.info("waiting for a snapshot%s%s", _because(result), nothing, extra=data)
        elif trouble[0] == "no_match":
            logger.warning("no_match: not one key of the snapshot is in the database", extra=data)
        else:
            logger.warning("%s%s", result.outcome, _because(result), extra=data)

    def end(self) -> None:
        """Say what is left to say of lines that were not logged."""
        _log_suppressed(self._trouble, math.inf)


def _log_suppressed(throttle: Throttle, now: float) -> None:
    """Say how many lines were not logged, so that nobody takes quiet for health."""
    for kind, count in throttle.suppressed(now).items():
        data = {"kind": kind, "suppressed": count, "seconds": WINDOW}
        minutes = WINDOW / 60
        logger.warning("%s: %d more in the last %d min", kind, count, minutes, extra={"data": data})


def _trouble(result: PersistResult) -> tuple[str, str | None] | None:
    """Return the kind of trouble, and what of it is worth a line when it changes; None if well."""
    if result.failed_rows:
        # They are named once: which and how many they are may change each time.
        return result.outcome, "rows"
    if result.outcome not in ("applied", "unchanged"):
        return result.outcome, result.error or result.cause
    if result.matches_nothing:
        return "no_match", None
    return (result.outcome, result.error) if result.error else None


def _because(result: PersistResult) -> str:
    return f": {result.error}" if result.error else ""


def summary(result: PersistResult) -> str:
    """Return one line on an applied snapshot."""
    failed = f", {result.failed_rows} refused" if result.failed_rows else ""
    return (
        f"{result.outcome}: {result.changed} rows changed ({result.changed_active} active,"
        f" {result.changed_inactive} inactive{failed}) of {result.entries} entries,"
        f" {result.skipped_unknown} unknown, {result.skipped_unrecognized} unrecognized,"
        f" {result.unmatched} unmatched; {result.seconds * 1000:.1f} ms, lock held for at most"
        f" {result.lock_seconds * 1000:.1f} ms; {result.reason}, written at {result.written_at}"
    )


class StateLog:
    """A hook for the way of watching: one line per change of state, none per sync.

    Args:
        clock: seconds that never go back.

    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        start = WatchState()
        self._said_rearms = start.rearms
        self._watching = Throttle((start.mode, start.why, start.rearms))
        self._sweeps = Throttle(start.sweep_hits)
        self._stuck = Throttle(calm=False, remind_after=REMINDER)

    def __call__(self, state: WatchState) -> None:
        """Log what is new in `state`."""
        now = self._clock()
        for throttle in (self._watching, self._sweeps, self._stuck):
            _log_suppressed(throttle, now)
        if self._watching.is_news((state.mode, state.why, state.rearms), "watching", now):
            rearmed = state.rearms > self._said_rearms
            self._said_rearms = state.rearms
            again = f" (armed anew: {state.last_problem})" if rearmed else ""
            logger.info("watching by %s: %s%s", state.mode, state.why, again, extra=_data(state))
        if self._sweeps.is_news(state.sweep_hits, "sweep", now):
            logger.info("the sweep found a change that no event told of", extra=_data(state))
        stuck = state.stuck_since is not None
        if self._stuck.is_news(stuck, "stuck", now):
            if stuck:
                logger.warning("the filesystem does not answer; waiting for it", extra=_data(state))
            else:
                logger.info("the filesystem answers again", extra=_data(state))

    def end(self) -> None:
        """As that of the other log."""
        for throttle in (self._watching, self._sweeps, self._stuck):
            _log_suppressed(throttle, math.inf)


def _data(state: WatchState) -> dict[str, object]:
    return {"data": dataclasses.asdict(state)}
